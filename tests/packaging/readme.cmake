# Checks that the README opens with examples/quickstart.cpp and, given PROGRAM, shows what that prints.
#   cmake -D ROOT=<project> [-D PROGRAM=<quickstart>] -P readme.cmake
cmake_minimum_required(VERSION 3.24)

# Cuts the first fenced block that opens with `fence` out of `text`, and all before it.
function(take_block fence text block)
  string(FIND "${${text}}" "${fence}" begin)
  if(begin EQUAL -1)
    message(FATAL_ERROR "README.md has no block that opens with ${fence}")
  endif()
  string(SUBSTRING "${${text}}" ${begin} -1 rest)
  string(FIND "${rest}" "\n" begin)
  math(EXPR begin "${begin} + 1")
  string(SUBSTRING "${rest}" ${begin} -1 rest)
  string(FIND "${rest}" "```" end)
  string(SUBSTRING "${rest}" 0 ${end} taken)
  math(EXPR end "${end} + 3")
  string(SUBSTRING "${rest}" ${end} -1 rest)
  set(${block} "${taken}" PARENT_SCOPE)
  set(${text} "${rest}" PARENT_SCOPE)
endfunction()

file(READ ${ROOT}/README.md readme)
file(READ ${ROOT}/examples/quickstart.cpp quickstart)
take_block("```cpp\n" readme program)
take_block("```" readme output)

if(NOT PROGRAM)
  if(NOT program STREQUAL quickstart)
    message(FATAL_ERROR "README.md's first program is not examples/quickstart.cpp")
  endif()
  return()
endif()

execute_process(COMMAND ${PROGRAM} OUTPUT_VARIABLE printed COMMAND_ERROR_IS_FATAL ANY)
if(NOT printed STREQUAL output)
  message(NOTICE "README.md shows\n${output}\nbut quickstart prints\n${printed}")
  message(FATAL_ERROR "README.md does not show what quickstart prints")
endif()
