# The methods beside a Linear on shapes small enough for a test: what it reports, and what misuse gives. No time is judged.
cmake_minimum_required(VERSION 3.24)

file(REMOVE_RECURSE ${folder})
file(MAKE_DIRECTORY ${folder})
include(${CMAKE_CURRENT_LIST_DIR}/../support/expect.cmake)
include(${CMAKE_CURRENT_LIST_DIR}/rows.cmake)

if(case STREQUAL report)
  expect(0 "quartiles" --quick --json ${folder}/report.json)
  read_rows(${folder}/report.json rows)
  foreach(row IN ITEMS "DoRA, over Linear" "DoRA, exact, over Linear" "MultiLoRA of 3, over Linear of rank 24" "MultiLoRA of 3, over Linear"
                       "NOLA of 64 bases, over Linear" "NOLA of 512 bases, over Linear" "Initialized, over Linear" "Chain of 2, over Linear"
                       "Proportional, over Linear" "Flow of 2, over Linear" "ResLoRA of 4 links, over 4 Linears"
                       "NOLA's bytes, 1024 bases over 16" "NOLA's peak memory, 1024 bases over 16")
    if(NOT row IN_LIST rows)
      message(FATAL_ERROR "no row \"${row}\" among:\n${rows}")
    endif()
  endforeach()
  # Memory, unlike time, is the same on every machine.
  file(READ ${folder}/report.json json)
  list(FIND rows "NOLA's bytes but for coefficients, 1024 bases over 16" bytes)
  string(JSON ratio GET "${json}" ${bytes} ratio)
  if(NOT ratio EQUAL 1)
    message(FATAL_ERROR "NOLA's memory grows with its bases: ${ratio}")
  endif()
  list(LENGTH rows count)
  # Another run goes on with the file, and with the table.
  expect(0 "128->64x8" --quick --shapes 128 --methods DoRA --threads 1 --json ${folder}/report.json --append)
  read_rows(${folder}/report.json rows)
  list(LENGTH rows more)
  math(EXPR added "${more} - ${count}")
  if(NOT added EQUAL 2 OR output MATCHES "quartiles|MultiLoRA")
    message(FATAL_ERROR "${count} rows became ${more}, with the output\n${output}")
  endif()

elseif(case STREQUAL misuse)
  expect(109 "--no-such-option" --no-such-option)
  expect(105 "--rounds" --quick --rounds 0)
  expect(105 "--threads" --quick --threads 0)
  expect(107 "--append" --quick --append)
  expect(1 "cannot read ${folder}/missing" --quick --json ${folder}/missing --append)
  expect(1 "cannot write ${folder}/none/report.json" --quick --json ${folder}/none/report.json)

else()
  message(FATAL_ERROR "no such case: ${case}")
endif()
