# The methods beside a Linear on shapes small enough for a test: what it reports, and what misuse gives. No time is judged.
cmake_minimum_required(VERSION 3.24)
include(${CMAKE_CURRENT_LIST_DIR}/rows.cmake)

if(case STREQUAL report)
  expect(0 "quartiles" --quick --json ${folder}/report.json)
  read_rows(${folder}/report.json rows)
  expect_rows("${rows}" "DoRA, over Linear" "DoRA, exact, over Linear" "MultiLoRA of 3, over Linear of rank 24" "MultiLoRA of 3, over Linear"
              "NOLA of 64 bases, over Linear" "NOLA of 512 bases, over Linear" "OffsetLowRank, over Linear" "Chain of 2, over Linear"
              "Proportional, over Linear" "Flow of 2, over Linear" "ResLoRA of 4 links, over 4 Linears"
              "NOLA's bytes, 1024 bases over 16" "NOLA's peak memory, 1024 bases over 16")
  # Memory, unlike time, is the same on every machine.
  file(READ ${folder}/report.json json)
  list(FIND rows "NOLA's bytes but for coefficients, 1024 bases over 16" bytes)
  string(JSON ratio GET "${json}" ${bytes} ratio)
  if(NOT ratio EQUAL 1)
    message(FATAL_ERROR "NOLA's memory grows with its bases: ${ratio}")
  endif()
  # Of the methods and shapes that were asked for alone, and without another head for the table.
  expect_appended("${rows}" "128->64x8" --quick --shapes 128 --methods DoRA --threads 1)
  if(NOT added EQUAL 2 OR output MATCHES "quartiles|MultiLoRA")
    message(FATAL_ERROR "${added} rows more, with the output\n${output}")
  endif()

elseif(case STREQUAL misuse)
  expect_misuse(--quick)

else()
  message(FATAL_ERROR "no such case: ${case}")
endif()
