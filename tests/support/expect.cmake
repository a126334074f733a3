# For tests of programs: include it with `program` set.

# Runs the program; expects its exit code and, if given, some text on either stream. Sets `output`, both streams.
function(expect code wanted)
  execute_process(COMMAND ${program} ${ARGN} RESULT_VARIABLE result OUTPUT_VARIABLE out ERROR_VARIABLE err)
  if(NOT result EQUAL code)
    message(FATAL_ERROR "${ARGN}\nexpected exit code ${code}, got ${result}\n${out}${err}")
  endif()
  string(FIND "${out}${err}" "${wanted}" found)
  if(found EQUAL -1)
    message(FATAL_ERROR "${ARGN}\nexpected \"${wanted}\" in\n${out}${err}")
  endif()
  set(output "${out}${err}" PARENT_SCOPE)
endfunction()
