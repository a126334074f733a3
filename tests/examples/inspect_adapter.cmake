# What inspect_adapter shows of each kind of file, what it makes of malformed ones, and whether what it merges is W + s(b) B A.
cmake_minimum_required(VERSION 3.24)

file(REMOVE_RECURSE ${folder})
file(MAKE_DIRECTORY ${folder})
execute_process(COMMAND ${write_adapters} ${folder} COMMAND_ERROR_IS_FATAL ANY)

include(${CMAKE_CURRENT_LIST_DIR}/../support/expect.cmake)

# The last output holds each of these texts.
function(expect_in_output)
  foreach(wanted IN LISTS ARGN)
    string(FIND "${output}" "${wanted}" found)
    if(found EQUAL -1)
      message(FATAL_ERROR "expected \"${wanted}\" in\n${output}")
    endif()
  endforeach()
endfunction()

# The program refuses its arguments in exactly one line, which begins with its name and holds the text.
function(expect_refusal wanted)
  expect(1 "${wanted}" ${ARGN})
  if(NOT output MATCHES "^inspect_adapter: [^\n]*\n$")
    message(FATAL_ERROR "${ARGN}\nexpected one line, got\n${output}")
  endif()
  set(output "${output}" PARENT_SCOPE)
endfunction()

# Merges and compares: options of the program, then those of write_adapters behind the name of the merged file.
function(expect_merge adapter base set options comparison)
  expect(0 "tensors merged" ${folder}/${adapter} --merge ${folder}/${base} --out ${folder}/merged.safetensors ${options})
  execute_process(COMMAND ${write_adapters} ${folder} ${set} ${folder}/merged.safetensors ${comparison} RESULT_VARIABLE result ERROR_VARIABLE problem)
  if(NOT result EQUAL 0)
    message(FATAL_ERROR "${adapter} merged into ${base} with ${options}: ${problem}")
  endif()
  set(output "${output}" PARENT_SCOPE)
endfunction()

if(case STREQUAL kinds)
  expect(0 "PEFT adapter" ${folder}/adapter)
  expect_in_output("\"adapter_config.json: lora_alpha\": \"8\"" "\"format\": \"pt\"" "lora_A.weight" "F64      4 × 6"
                   "\"model.layers.0.q\": 8 × 6, rank 4, scale 2 (lora_alpha 8 / r 4)"
                   "\"model.layers.0.v\": 8 × 6, rank 2, scale 4 (lora_alpha 8 / r 2 (rank_pattern))"
                   "\"model.layers.0.o\": 8 × 6, rank 4, scale 0.75 (lora_alpha 3 (alpha_pattern) / r 4)" "all modules: 4, 196 parameters")
  expect(0 "scale 4 (lora_alpha 8 / sqrt of r 4, use_rslora)" ${folder}/rslora)

  # Components of norms 0.1, 3 and 4 at right angles, times a scale of 2.
  foreach(file IN ITEMS orthogonal adapter.gguf)
    expect(0 "rank 3, scale 2" ${folder}/${file})
    expect_in_output("‖s B_i‖ ‖A_i‖   0.2 6 8" "singular values 8 6 0.2" "99 % of ‖ΔW‖²: rank 3 in this order, rank 2 in the best")
  endforeach()
  expect_in_output("GGUF adapter" "adapter.lora.alpha 6 / rank 3" "\"general.architecture\": \"llama\"" "F32      3 × 4")
  expect(0 "scale 1 (no adapter.lora.alpha)" ${folder}/scale_1.gguf)
  expect(0 "shown as if it were 1" ${folder}/orthogonal/adapter_model.safetensors)
  expect_in_output("‖s B_i‖ ‖A_i‖   0.1 3 4")

  expect(0 "tensors: 6, elements: 197" ${folder}/base.safetensors)
  expect_in_output("\"made by\": \"a test\"" "BF16     8 × 6" "I64      2")
  if(output MATCHES "module")
    message(FATAL_ERROR "a base model has no modules:\n${output}")
  endif()
  expect(0 "tensors: 6, elements: 197" ${folder}/shards)
  expect_in_output("model in 2 safetensors files")
  expect(0 "\"tokens\": \"an array of 2\"" ${folder}/model.gguf)
  expect_in_output("GGUF file" "F32      8 × 6" "tensors: 1, elements: 48")
  expect(0 "step: 7" ${folder}/checkpoint.safetensors)
  expect_in_output("checkpoint")
  expect(0 "red \\x1b[31m\\x0a" ${folder}/hostile.safetensors)

elseif(case STREQUAL json)
  foreach(file IN ITEMS orthogonal adapter.gguf)
    expect(0 "" ${folder}/${file} --json)
    string(JSON rank GET "${output}" modules 0 rank_keeping_99_percent best)
    string(JSON scale GET "${output}" modules 0 scale)
    string(JSON largest GET "${output}" modules 0 singular_values 0)
    string(JSON rows GET "${output}" tensors 0 shape 0)
    string(JSON parameters GET "${output}" all_modules parameters)
    if(NOT "${rank} ${scale} ${largest} ${rows} ${parameters}" STREQUAL "2 2.0 8.0 3 27")
      message(FATAL_ERROR "unexpected values in\n${output}")
    endif()
    # Without components of 6 and 8, a relative error of 10 / √100.04; without that of 8, 8 / √100.04; the rule changes what is left.
    foreach(expected IN ITEMS "max-rank 1 0.9998" "max-rank 2 0.79984" "rank 2 0.85428" "sqrt-rank 2 0.8111" "max-rank 3 0")
      string(REPLACE " " ";" expected "${expected}")
      list(GET expected 0 rule)
      list(GET expected 1 rank)
      list(GET expected 2 error)
      expect(0 "" ${folder}/${file} --json --scale-rule ${rule})
      string(JSON found GET "${output}" modules 0 relative_error given ${rank})
      string(FIND "${found}" "${error}" position)
      if(NOT position EQUAL 0)
        message(FATAL_ERROR "${rule}, rank ${rank}: expected an error of ${error}, got ${found}")
      endif()
    endforeach()
  endforeach()
  expect(0 "" ${folder}/hostile.safetensors --json)
  string(JSON count LENGTH "${output}" tensors)
  expect(0 "" ${folder}/checkpoint.safetensors --json)
  string(JSON step GET "${output}" step)
  expect(0 "" ${folder}/adapter --merge ${folder}/base.safetensors --out ${folder}/merged.safetensors --rank 2 --json)
  string(JSON rank GET "${output}" merged 0 rank)
  if(NOT "${count} ${step} ${rank}" STREQUAL "2 7 2")
    message(FATAL_ERROR "expected 2 tensors, step 7 and rank 2, got ${count}, ${step} and ${rank}")
  endif()

elseif(case STREQUAL merge)
  expect_merge(adapter base.safetensors usual "" "4;max-rank")
  expect_in_output("\"layers.0.v.weight\": BF16, out × in, rank 2 of 2, scale 4" "4 tensors merged" "largest rounding error")
  expect(0 "tensors: 6, elements: 197" ${folder}/merged.safetensors)
  expect_in_output("\"made by\": \"a test\"")
  expect_merge(adapter shards usual "" "4;max-rank")
  foreach(rank IN ITEMS 1 2 3 4)
    expect_merge(adapter base.safetensors usual "--rank;${rank}" "${rank};max-rank")
    foreach(rule IN ITEMS max-rank rank sqrt-rank)
      expect_merge(adapter base.safetensors usual "--rank;${rank};--scale-rule;${rule}" "${rank};${rule}")
    endforeach()
  endforeach()
  expect_merge(adapter base.safetensors usual "--rank;1" "1;max-rank")
  expect_in_output("--scale-rule max-rank")
  expect_merge(conv1d transposed.safetensors usual "--rank;3" "3;max-rank;transposed")
  expect_in_output("in × out")
  expect_merge(adapter transposed.safetensors usual "--fan-in-fan-out" "4;max-rank;transposed")
  expect_merge(ties ties.safetensors ties "" "1;max-rank")

  # Onto the base itself: it is read to its end before it is replaced.
  file(COPY_FILE ${folder}/base.safetensors ${folder}/own.safetensors)
  expect(0 "4 tensors merged" ${folder}/adapter --merge ${folder}/own.safetensors --out ${folder}/own.safetensors)
  execute_process(COMMAND ${write_adapters} ${folder} usual ${folder}/own.safetensors 4 max-rank COMMAND_ERROR_IS_FATAL ANY)

elseif(case STREQUAL malformed)
  expect_refusal("missing: cannot read" ${folder}/missing)
  expect_refusal("truncated download" ${folder}/cut_base.safetensors)
  expect_refusal("end of the file" ${folder}/cut_adapter.gguf)
  expect_refusal("Git LFS pointer" ${folder}/pointer.safetensors)
  expect_refusal("Python pickle" ${folder}/pickle.bin)
  expect_refusal("adapter_config.json: cannot read" ${folder}/no_config)
  expect_refusal("adapter_config.json: cannot read" ${folder}/empty)
  expect_refusal("damaged" ${folder}/damaged.safetensors)
  expect_refusal("expected a lora_A and a lora_B" ${folder}/lone.safetensors)
  expect_refusal("use_dora" ${folder}/dora)
  expect_refusal("\"base_model.model.model.layers.0.v.lora_A.weight\": expected 4 × 6" ${folder}/wrong_rank)

  expect_refusal("PEFT folder" ${folder}/adapter.gguf --merge ${folder}/base.safetensors --out ${folder}/merged.safetensors)
  foreach(problem IN ITEMS
      "rslora ambiguous.safetensors both.*layers.0.q.weight"
      "adapter ties.safetensors module.*expected.its.weight"
      "elsewhere base.safetensors layers.1.q.*got.none.of.that.name"
      "twice base.safetensors expected.one.module.for.it"
      "rslora integers.safetensors F64,.got.I64"
      "huge large.safetensors finite.as.F16"
      "adapter transposed.safetensors --fan-in-fan-out"
      "conv1d base.safetensors 6.×.8..in.×.out."
      "adapter missing.safetensors cannot.read"
      "adapter empty cannot.read")
    string(REPLACE " " ";" problem "${problem}")
    list(GET problem 0 adapter)
    list(GET problem 1 base)
    list(GET problem 2 wanted)
    expect_refusal("" ${folder}/${adapter} --merge ${folder}/${base} --out ${folder}/merged.safetensors)
    if(NOT output MATCHES "${wanted}")
      message(FATAL_ERROR "${adapter} into ${base}: expected ${wanted} in\n${output}")
    endif()
  endforeach()
  set(into_base ${folder}/adapter --merge ${folder}/base.safetensors --out)
  expect_refusal("--rank: expected a value in [1, 4], got 5" ${into_base} ${folder}/merged.safetensors --rank 5)
  expect_refusal("none/merged.safetensors" ${into_base} ${folder}/none/merged.safetensors)
  file(GLOB left ${folder}/merged.safetensors*)
  if(left)
    message(FATAL_ERROR "a merge that failed left ${left}")
  endif()

  expect(106 "path is required")
  expect(107 "--merge requires --out" ${folder}/adapter --merge ${folder}/base.safetensors)
  expect(107 "--rank requires --merge" ${folder}/adapter --rank 2)
  expect(105 "--scale-rule" ${folder}/adapter --scale-rule cubic)
  expect(0 "max-rank leaves it as it is" --help)

else()
  message(FATAL_ERROR "no such case: ${case}")
endif()
