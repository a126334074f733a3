# The cost of a step on shapes small enough for a test: what it reports, and what misuse gives.
cmake_minimum_required(VERSION 3.24)
include(${CMAKE_CURRENT_LIST_DIR}/rows.cmake)
set(small --quick --alone)

if(case STREQUAL report)
  expect(0 "quartiles" ${small} --json ${folder}/report.json)
  read_rows(${folder}/report.json rows)
  expect_rows("${rows}" "adapted step over the best library's frozen pair: Eigen" "adapted step over our own frozen pair"
              "growth of the step from rank 8 to 64 over that of its flops" "our own frozen pair over Eigen's"
              "adapted step on one thread over this many" "adapted forward over the best library's frozen one: Eigen"
              "reading W, column-major, over the adapted forward" "reading W, row-major, over the adapted forward")
  expect_appended("${rows}" "64->128x8" ${small} --shapes 128 --threads 1)
  if(output MATCHES "quartiles")
    message(FATAL_ERROR "the table has another head:\n${output}")
  endif()

elseif(case STREQUAL misuse)
  expect_misuse(${small})

else()
  message(FATAL_ERROR "no such case: ${case}")
endif()
