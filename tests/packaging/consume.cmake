# Configures, builds and runs the consumer from nothing, and checks that its compiler saw no flag of ours.
#   cmake -D WORK=<scratch folder> -D DYLORA_BUILD=<build folder> -P consume.cmake -- <arguments for configuring>
cmake_minimum_required(VERSION 3.24)

set(arguments)
foreach(i RANGE ${CMAKE_ARGC})
  if(DEFINED past_dashes)
    list(APPEND arguments ${CMAKE_ARGV${i}})
  elseif(CMAKE_ARGV${i} STREQUAL "--")
    set(past_dashes TRUE)
  endif()
endforeach()

file(REMOVE_RECURSE ${WORK})
if("WAY=find_package" IN_LIST arguments)
  execute_process(COMMAND ${CMAKE_COMMAND} --install ${DYLORA_BUILD} --prefix ${WORK}/prefix COMMAND_ERROR_IS_FATAL ANY)
endif()

unset(ENV{CXXFLAGS})
execute_process(
  COMMAND ${CMAKE_COMMAND} -S ${CMAKE_CURRENT_LIST_DIR}/consumer -B ${WORK}/build ${arguments}
          -D CMAKE_PREFIX_PATH=${WORK}/prefix -D CMAKE_EXPORT_COMPILE_COMMANDS=ON
  COMMAND_ERROR_IS_FATAL ANY)

file(READ ${WORK}/build/compile_commands.json commands)
string(REGEX MATCHALL " -[DOWfgm][^ ]*" flags "${commands}")
list(FILTER flags EXCLUDE REGEX "^ -fopenmp|^ -DWANT_OPENMP=|^ -DWITH_IO")
if(flags)
  message(FATAL_ERROR "dylora leaks compile flags:${flags}")
endif()

execute_process(COMMAND ${CMAKE_COMMAND} --build ${WORK}/build COMMAND_ERROR_IS_FATAL ANY) # runs the program, too
