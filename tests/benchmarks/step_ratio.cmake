# The cost of a step on shapes small enough for a test: what it reports, and what misuse gives.
cmake_minimum_required(VERSION 3.24)

file(REMOVE_RECURSE ${folder})
file(MAKE_DIRECTORY ${folder})
include(${CMAKE_CURRENT_LIST_DIR}/../support/expect.cmake)
include(${CMAKE_CURRENT_LIST_DIR}/rows.cmake)
set(small --quick --alone)

if(case STREQUAL report)
  expect(0 "quartiles" ${small} --json ${folder}/report.json)
  read_rows(${folder}/report.json rows)
  foreach(row IN ITEMS "adapted step over the best library's frozen pair: Eigen" "adapted step over our own frozen pair"
                       "growth of the step from rank 8 to 64 over that of its flops" "our own frozen pair over Eigen's"
                       "adapted step on one thread over this many" "adapted forward over the best library's frozen one: Eigen"
                       "reading W, column-major, over the adapted forward" "reading W, row-major, over the adapted forward")
    if(NOT row IN_LIST rows)
      message(FATAL_ERROR "no row \"${row}\" among:\n${rows}")
    endif()
  endforeach()
  list(LENGTH rows count)
  # Another run goes on with the file, and with the table.
  expect(0 "64->128x8" ${small} --shapes 128 --threads 1 --json ${folder}/report.json --append)
  read_rows(${folder}/report.json rows)
  list(LENGTH rows more)
  if(NOT more GREATER count OR output MATCHES "quartiles")
    message(FATAL_ERROR "${count} rows became ${more}, with the output\n${output}")
  endif()

elseif(case STREQUAL misuse)
  expect(109 "--no-such-option" --no-such-option)
  expect(105 "--rounds" ${small} --rounds 0)
  expect(105 "--threads" ${small} --threads 0)
  expect(107 "--append" ${small} --append)
  expect(1 "cannot read ${folder}/missing" ${small} --json ${folder}/missing --append)
  expect(1 "cannot write ${folder}/none/report.json" ${small} --json ${folder}/none/report.json)

else()
  message(FATAL_ERROR "no such case: ${case}")
endif()
