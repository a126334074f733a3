# For tests of programs that report rows: include it with `program`, `case` and `folder` set. The folder is then empty.
include(${CMAKE_CURRENT_LIST_DIR}/../support/expect.cmake)
file(REMOVE_RECURSE ${folder})
file(MAKE_DIRECTORY ${folder})

# read_rows(FILE VARIABLE): what the rows of a benchmark's report are about. Every row must be complete and make sense; no time is judged.
function(read_rows file variable)
  file(READ ${file} json)
  string(JSON count LENGTH "${json}")
  math(EXPR last "${count} - 1")
  set(rows "")
  foreach(i RANGE ${last})
    foreach(key IN ITEMS what shape rank threads ratio low high goal met)
      string(JSON ${key} GET "${json}" ${i} ${key}) # an error if it is not there
    endforeach()
    string(JSON goal_type TYPE "${json}" ${i} goal)
    string(JSON met_type TYPE "${json}" ${i} met)
    if(NOT low GREATER 0 OR low GREATER ratio OR ratio GREATER high OR threads LESS 1 OR rank LESS 0
       OR NOT "${goal_type} ${met_type}" MATCHES "^(NULL NULL|NUMBER BOOLEAN)$")
      string(JSON row GET "${json}" ${i})
      message(FATAL_ERROR "a row that makes no sense:\n${row}")
    endif()
    list(APPEND rows "${what}")
  endforeach()
  set(${variable} "${rows}" PARENT_SCOPE)
endfunction()

# expect_rows(ROWS ROW...): each of these is one of the rows.
function(expect_rows rows)
  foreach(row IN LISTS ARGN)
    if(NOT row IN_LIST rows)
      message(FATAL_ERROR "no row \"${row}\" among:\n${rows}")
    endif()
  endforeach()
endfunction()

# expect_appended(ROWS WANTED ARG...): another run, with --append, goes on with report.json, which has these rows. Sets `output` and `added`,
# the number of its own.
function(expect_appended rows wanted)
  expect(0 "${wanted}" ${ARGN} --json ${folder}/report.json --append)
  read_rows(${folder}/report.json all)
  list(LENGTH rows count)
  list(LENGTH all more)
  if(NOT more GREATER count)
    message(FATAL_ERROR "${count} rows became ${more}, with the output\n${output}")
  endif()
  math(EXPR added "${more} - ${count}")
  set(added ${added} PARENT_SCOPE)
  set(output "${output}" PARENT_SCOPE)
endfunction()

# expect_misuse(ARG...): what misuse gives, with these arguments for a quick run.
function(expect_misuse)
  expect(109 "--no-such-option" --no-such-option)
  expect(105 "--rounds" ${ARGN} --rounds 0)
  expect(105 "--threads" ${ARGN} --threads 0)
  expect(107 "--append" ${ARGN} --append)
  expect(1 "cannot read ${folder}/missing" ${ARGN} --json ${folder}/missing --append)
  expect(1 "cannot write ${folder}/none/report.json" ${ARGN} --json ${folder}/none/report.json)
endfunction()
