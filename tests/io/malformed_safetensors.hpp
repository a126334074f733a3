#ifndef DYLORA_TESTS_IO_MALFORMED_SAFETENSORS_HPP
#define DYLORA_TESTS_IO_MALFORMED_SAFETENSORS_HPP

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

/// Files as they should not be, each with what its message has to say; and unusual ones that are as they should be.
namespace dylora::test {

struct SafetensorsProbe {
  std::string name, bytes;
  std::vector<std::string> says;
};

inline std::string size_word(std::uint64_t size) {
  std::string word(8, '\0');
  std::memcpy(word.data(), &size, 8);
  return word;
}

inline std::string safetensors_bytes(std::string_view header, std::size_t data) {
  return size_word(header.size()).append(header) + std::string(data, '\0');
}

/// A tensor in the header.
inline std::string described(std::string_view name, std::string_view dtype, std::string_view shape, std::string_view offsets) {
  return std::string("\"").append(name) + R"(":{"dtype":)" + std::string(dtype) + R"(,"shape":)" + std::string(shape) +
         R"(,"data_offsets":)" + std::string(offsets) + "}";
}

/// A file of one tensor "t".
inline std::string one_tensor(std::string_view dtype, std::string_view shape, std::string_view offsets, std::size_t data) {
  return safetensors_bytes("{" + described("t", dtype, shape, offsets) + "}", data);
}

inline std::string repeated(std::string_view part, int times) {
  std::string text;
  for (int i = 0; i < times; ++i) text += part;
  return text;
}

/// The good file that most of the probes differ from in one way: a 2 × 2 tensor "t" of I32.
inline const std::string& good_header() {
  static const std::string header = "{" + described("t", R"("I32")", "[2,2]", "[0,16]") + "}";
  return header;
}

inline std::vector<SafetensorsProbe> malformed_sizes() {
  const std::string header = good_header(), good = safetensors_bytes(header, 16);  // 57 and 81 bytes
  const std::string too_large = "byte 0: length of the header: expected 1 to 100000000, got ";
  const auto of_size = [&](std::uint64_t size) { return size_word(size) + good.substr(8); };
  std::string big_endian = good;
  std::reverse(big_endian.begin(), big_endian.begin() + 8);
  return {
      {"empty", "", {"expected a safetensors file of at least 8 bytes, got 0"}},
      {"7 bytes", std::string(7, '\0'), {"at least 8 bytes, got 7"}},
      {"the size alone", size_word(57), {"byte 0: length of the header: expected at most the 0 bytes that follow, got 57"}},
      {"a size past the end",
       of_size(1000),
       {"at most the 73 bytes that follow, got 1000; bytes missing of it: 927", "truncated download"}},
      {"size 2^64 - 1", of_size(UINT64_MAX), {too_large + "18446744073709551615"}},
      {"size 2^64 - 8, which wraps", of_size(UINT64_MAX - 7), {too_large + "18446744073709551608"}},
      {"size 100 000 001", of_size(100'000'001), {too_large + "100000001"}},
      {"size 100 000 000, with little there",
       of_size(100'000'000),
       {"at most the 73 bytes that follow, got 100000000; bytes missing of it: 99999927"}},
      {"big-endian size", big_endian, {too_large + "4107282860161892352", "big-endian"}},
      {"Git LFS pointer",
       "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
       {too_large, "looks like a Git LFS pointer", "git lfs pull"}},
      {"zip archive", "PK\3\4" + std::string(100, '\x14'), {too_large, "looks like a zip archive, as torch.save writes"}},
      {"pickle", "\x80\2\x8a\nl\xfc\x9c" + std::string(100, 'F'), {too_large, "looks like a Python pickle"}},
      {"pickle with a frame", "\x80\4\x95" + std::string(5, '\0') + "}", {"length of the header", "looks like a Python pickle"}},
      {"GGUF", "GGUF" + std::string("\3\0\0\0\1\0\0\0\0\0\0\0", 12), {too_large, "looks like a GGUF file"}},
      {"HDF5", "\x89HDF\r\n\x1a\n" + std::string(100, '\0'), {too_large, "looks like an HDF5 file"}},
      {"gzip archive", "\x1f\x8b\x08" + std::string(100, 'z'), {too_large, "looks like a gzip archive"}},
      {"web page", "\n<!DOCTYPE html><html><head><title>Login</title></head></html>", {too_large, "looks like a web page"}},
      {"JSON error message", R"({"error":"Repository not found"})", {too_large, "looks like JSON"}},
      {"short JSON error message", "{}", {"at least 8 bytes, got 2; it looks like JSON"}},
      {"zeros", std::string(4096, '\0'), {too_large + "0; it looks like zeros", "interrupted"}},
      {"size 0", of_size(0), {too_large + "0"}},
      {"size too short", of_size(56), {"byte 64: header: expected JSON"}},
      {"size too long", of_size(58), {"byte 65: expected JSON, got a zero byte"}},
      {"header cut off",
       good.substr(0, 40),
       {"expected at most the 32 bytes that follow, got 57; bytes missing of it: 25", "truncated download"}},
  };
}

inline std::vector<SafetensorsProbe> malformed_encodings() {
  const auto named = [](std::string_view name) {
    return safetensors_bytes("{" + described(name, R"("I32")", "[2,2]", "[0,16]") + "}", 16);
  };
  return {
      {"invalid UTF-8", named("\xff"), {"byte 10: header: expected JSON"}},
      {"overlong UTF-8", named("a\xc0\x80"), {"byte 11: header: expected JSON"}},
      {"surrogate in UTF-8", named("\xed\xa0\x80"), {"byte 11: header: expected JSON"}},
      {"lone surrogate escape", named("\\ud800"), {"byte 16: header: expected JSON"}},
      {"line break in a string", named("a\nb"), {"byte 11: header: expected JSON"}},
      {"zero byte in a string", named(std::string(1, '\0')), {"byte 10: expected JSON, got a zero byte"}},
      {"byte order mark", safetensors_bytes("\xef\xbb\xbf" + good_header(), 16), {"byte 8: expected JSON, got a byte order mark"}},
  };
}

inline std::vector<SafetensorsProbe> malformed_json() {
  const std::string header = good_header(), body = header.substr(1, header.size() - 2);
  const auto text = [](std::string_view json) { return safetensors_bytes(json, 16); };
  const std::string no_json = "header: expected JSON, got something else or its end", no_object = "header: expected a JSON object, got ";
  return {
      {"no JSON", text("not JSON"), {"byte 9: " + no_json}},
      {"white space", text("        "), {no_json}},
      {"array", text("[]"), {no_object + "an array"}},
      {"null", text("null"), {no_object + "null"}},
      {"string", text(R"("x")"), {no_object + "a string"}},
      {"number", text("1"), {no_object + "a number"}},
      {"something behind", text(header + "x"), {"byte 65: " + no_json}},
      {"two objects", text(header + header), {"byte 65: " + no_json}},
      {"two empty objects", safetensors_bytes("{}{}", 0), {"byte 10: " + no_json}},
      {"zero bytes behind", text(header + std::string(7, '\0')), {"byte 65: expected JSON, got a zero byte"}},
      {"comma behind the tensor", text("{" + body + ",}"), {no_json}},
      {"comma behind the offsets", one_tensor(R"("I32")", "[2,2]", "[0,16,]", 16), {no_json}},
      {"comment", text("/* a comment */" + header), {"byte 8: " + no_json}},
      {"comment to the end of the line", text(header + "// a comment"), {no_json}},
      {"single quotes", text("{'t':{'dtype':'I32','shape':[2,2],'data_offsets':[0,16]}}"), {"byte 9: " + no_json}},
      {"100 000 nested arrays", text(repeated("[", 100'000) + repeated("]", 100'000)), {no_object + "an array"}},
      {"100 000 arrays left open", text(repeated("[", 100'000)), {no_object + "an array"}},
      {"100 000 nested objects", text(repeated(R"({"a":)", 100'000)), {"tensor \"a\": expected JSON nested at most 64 deep"}},
      {"100 000 nested arrays in an unknown field",
       text(R"({"t":{"x":)" + repeated("[", 100'000) + repeated("]", 100'000) + "}}"),
       {"tensor \"t\": expected JSON nested at most 64 deep"}},
      {"100 000 nested objects in an unknown field",
       text(R"({"t":{"x":)" + repeated(R"({"a":)", 100'000)),
       {"tensor \"t\": expected JSON nested at most 64 deep"}},
  };
}

inline std::vector<SafetensorsProbe> malformed_metadata() {
  const std::string header = good_header(), body = header.substr(1);
  const auto with = [&](std::string_view metadata) {
    return safetensors_bytes(R"({"__metadata__":)" + std::string(metadata) + "," + body, 16);
  };
  const std::string key = R"(header: __metadata__: key "a": expected a string, got )",
                    object = "header: __metadata__: expected an object of strings, got ";
  return {
      {"metadata number", with(R"({"a":1})"), {key + "a number"}},
      {"metadata negative number", with(R"({"a":-1})"), {key + "a negative number"}},
      {"metadata boolean", with(R"({"a":true})"), {key + "a boolean"}},
      {"metadata object", with(R"({"a":{}})"), {key + "an object"}},
      {"metadata array", with(R"({"a":[]})"), {key + "an array"}},
      {"metadata null", with(R"({"a":null})"), {key + "null"}},
      {"metadata is a string", with(R"("a")"), {object + "a string"}},
      {"metadata is an array", with("[]"), {object + "an array"}},
      {"tensor named __metadata__",
       with(R"({"dtype":"I32","shape":[0],"data_offsets":[0,0]})"),
       {R"(__metadata__: key "shape": expected a string, got an array)"}},
      {"metadata twice", with(R"({},"__metadata__":{})"), {R"(header: key "__metadata__": expected once, got it twice)"}},
      {"metadata twice, first as null", with(R"(null,"__metadata__":{})"), {R"(header: key "__metadata__": expected once, got it twice)"}},
      {"key twice in the metadata", with(R"({"a":"1","a":"1"})"), {R"(__metadata__: key "a": expected once, got it twice)"}},
  };
}

inline std::vector<SafetensorsProbe> malformed_entries() {
  const auto entry = [](std::string_view json) { return safetensors_bytes(R"({"t":)" + std::string(json) + "}", 16); };
  const std::string tensor = "header: tensor \"t\": ", object = tensor + "expected an object with dtype, shape and data_offsets, got ";
  const std::string dtype = tensor + "dtype: expected one that the format has, got ";
  const auto of_dtype = [](std::string_view json) { return one_tensor(json, "[2,2]", "[0,16]", 16); };
  return {
      {"entry null", entry("null"), {object + "null"}},
      {"entry string", entry(R"("I32")"), {object + "a string"}},
      {"entry number", entry("16"), {object + "a number"}},
      {"entry array", entry(R"(["I32",[2,2],[0,16]])"), {object + "an array"}},
      {"entry empty", entry("{}"), {tensor + "expected dtype, got none"}},
      {"no dtype", entry(R"({"shape":[2,2],"data_offsets":[0,16]})"), {tensor + "expected dtype, got none"}},
      {"no shape", entry(R"({"dtype":"I32","data_offsets":[0,16]})"), {tensor + "expected shape, got none"}},
      {"no data_offsets", entry(R"({"dtype":"I32","shape":[2,2]})"), {tensor + "expected data_offsets, got none"}},
      {"unknown dtype", of_dtype(R"("I33")"), {dtype + "\"I33\""}},
      {"empty dtype", of_dtype(R"("")"), {dtype + "\"\""}},
      {"lower-case dtype", of_dtype(R"("i32")"), {dtype + "\"i32\""}},
      {"dtype number", of_dtype("32"), {tensor + "dtype: expected a string, got a number"}},
      {"dtype null", of_dtype("null"), {tensor + "dtype: expected a string, got null"}},
      {"dtype array", of_dtype(R"(["I32"])"), {tensor + "dtype: expected a string, got an array"}},
      {"dtype object", of_dtype("{}"), {tensor + "dtype: expected a string, got an object"}},
      {"dtype twice", of_dtype(R"("I32","dtype":"I32")"), {tensor + "dtype: expected once, got it twice"}},
      {"shape twice", one_tensor(R"("I32")", R"([2,2],"shape":[2,2])", "[0,16]", 16), {tensor + "shape: expected once, got it twice"}},
      {"offsets twice",
       one_tensor(R"("I32")", "[2,2]", R"([0,16],"data_offsets":[0,16])", 16),
       {tensor + "data_offsets: expected once, got it twice"}},
      {"dtype twice, once escaped", of_dtype(R"("I32","\u0064type":"I32")"), {tensor + "dtype: expected once, got it twice"}},
      {"name twice, same bytes",
       safetensors_bytes("{" + described("t", R"("I32")", "[2,2]", "[0,16]") + "," + described("t", R"("I32")", "[2,2]", "[0,16]") + "}",
                         16),
       {tensor + "expected once, got it twice"}},
      {"name twice, other bytes",
       safetensors_bytes("{" + described("t", R"("I32")", "[2,2]", "[0,16]") + "," + described("t", R"("U8")", "[4]", "[16,20]") + "}", 20),
       {tensor + "expected once, got it twice"}},
      {"name twice, no bytes",
       safetensors_bytes("{" + described("t", R"("I32")", "[0]", "[0,0]") + "," + described("t", R"("U8")", "[0]", "[0,0]") + "}", 0),
       {tensor + "expected once, got it twice"}},
  };
}

inline std::vector<SafetensorsProbe> malformed_shapes() {
  const auto of_shape = [](std::string_view json) { return one_tensor(R"("I32")", json, "[0,16]", 16); };
  const std::string tensor = "header: tensor \"t\": ", array = tensor + "shape: expected an array of unsigned integers, got ";
  const std::string extents = tensor + "shape: expected unsigned integers, got ",
                    large = tensor + "shape: expected extents of at most 2^48, got ";
  const std::string overflow = tensor + "expected a shape of less than 2^64 bits, got ";
  return {
      {"negative extent", of_shape("[-2,2]"), {extents + "a negative number"}},
      {"extent -0", of_shape("[-0,2]"), {extents + "a negative number"}},
      {"extent 2.0", of_shape("[2.0,2]"), {extents + "a number that is no unsigned 64-bit integer"}},
      {"extent 2e0", of_shape("[2e0,2]"), {extents + "a number that is no unsigned 64-bit integer"}},
      {"extent string", of_shape(R"(["2",2])"), {extents + "a string"}},
      {"extent null", of_shape("[null,2]"), {extents + "null"}},
      {"extent boolean", of_shape("[true,2]"), {extents + "a boolean"}},
      {"extent array", of_shape("[[2,2]]"), {extents + "an array"}},
      {"extent object", of_shape("[{}]"), {extents + "an object"}},
      {"shape number", of_shape("4"), {array + "a number"}},
      {"shape null", of_shape("null"), {array + "null"}},
      {"shape string", of_shape(R"("[2,2]")"), {array + "a string"}},
      {"shape object", of_shape("{}"), {array + "an object"}},
      {"leading zero", of_shape("[02,2]"), {"byte 38: header: expected JSON"}},
      {"plus sign", of_shape("[+2,2]"), {"header: expected JSON"}},
      {"hexadecimal", of_shape("[0x2,2]"), {"header: expected JSON"}},
      {"extent 2^64", of_shape("[18446744073709551616,2]"), {extents + "a number that is no unsigned 64-bit integer"}},
      {"extent 1e999", of_shape("[1e999]"), {"header: expected JSON"}},
      {"extent 2^64 - 1", of_shape("[18446744073709551615,2]"), {large + "18446744073709551615"}},
      {"extent 2^62 + 4, whose bytes wrap to 16", of_shape("[4611686018427387908]"), {large + "4611686018427387908"}},
      {"extent 2^48 + 1", of_shape("[281474976710657,0]"), {large + "281474976710657"}},
      {"extents 0, 2^63, 2^63", of_shape("[0,9223372036854775808,9223372036854775808]"), {large + "9223372036854775808"}},
      {"extents 2^63, 2^63, 0", of_shape("[9223372036854775808,9223372036854775808,0]"), {large + "9223372036854775808"}},
      {"elements overflow", of_shape("[281474976710656,65536]"), {overflow + "281474976710656 × 65536"}},
      {"elements wrap to 4", of_shape("[4294967296,4294967296,4]"), {overflow}},
      {"bytes overflow", of_shape("[4294967296,1073741824]"), {overflow}},
      {"bits overflow, bytes do not", of_shape("[1073741824,1073741824]"), {overflow}},
      {"65 dimensions", of_shape("[" + repeated("1,", 64) + "4]"), {tensor + "shape: expected at most 64 dimensions"}},
      {"10 000 dimensions", of_shape("[" + repeated("1,", 9999) + "4]"), {tensor + "shape: expected at most 64 dimensions"}},
      {"three elements of four bits", one_tensor(R"("F4")", "[3]", "[0,2]", 2), {tensor + "expected a shape of whole bytes, got 12 bits"}},
      {"one element of six bits", one_tensor(R"("F6_E2M3")", "[]", "[0,1]", 1), {tensor + "expected a shape of whole bytes, got 6 bits"}},
  };
}

inline std::vector<SafetensorsProbe> malformed_offsets() {
  const auto at = [](std::string_view json) { return one_tensor(R"("I32")", "[2,2]", json, 16); };
  const auto two = [](std::string_view first, std::string_view second, std::string_view offsets, std::size_t data) {
    return safetensors_bytes("{" + described("t", R"("I32")", first, "[0,16]") + "," + described("u", R"("I32")", second, offsets) + "}",
                             data);
  };
  const std::string t = "header: tensor \"t\": ", u = "header: tensor \"u\": ",
                    numbers = t + "data_offsets: expected unsigned integers, got ";
  const std::string array = t + "data_offsets: expected an array of two unsigned integers, got ",
                    pair = t + "data_offsets: expected two numbers, got ";
  const std::string no_gap = ", without a gap or an overlap, got data_offsets ";
  return {
      {"no offset", at("[]"), {pair + "0"}},
      {"one offset", at("[16]"), {pair + "1"}},
      {"three offsets", at("[0,16,16]"), {pair + "more"}},
      {"offsets object", at(R"({"begin":0,"end":16})"), {array + "an object"}},
      {"offsets number", at("16"), {array + "a number"}},
      {"offsets null", at("null"), {array + "null"}},
      {"fractions", at("[0.0,16.0]"), {numbers + "a number that is no unsigned 64-bit integer"}},
      {"exponents", at("[0,16e0]"), {numbers + "a number that is no unsigned 64-bit integer"}},
      {"offset -0", at("[-0,16]"), {numbers + "a negative number"}},
      {"negative offset", at("[-16,0]"), {numbers + "a negative number"}},
      {"offset string", at(R"(["0",16])"), {numbers + "a string"}},
      {"offset array", at("[[0,16]]"), {numbers + "an array"}},
      {"offset 2^64", at("[0,18446744073709551616]"), {numbers + "a number that is no unsigned 64-bit integer"}},
      {"offset 2^64 - 1",
       at("[0,18446744073709551615]"),
       {t + "expected the 16 bytes of its dtype and shape, got data_offsets [0, 18446744073709551615]"}},
      {"offsets that wrap", at("[18446744073709551608,8]"), {t + "expected an end that is not before the beginning"}},
      {"end before the beginning", at("[16,0]"), {t + "expected an end that is not before the beginning, got data_offsets [16, 0]"}},
      {"first tensor not at 0", one_tensor(R"("I32")", "[2,2]", "[4,20]", 20), {t + "expected to begin at 0" + no_gap + "[4, 20]"}},
      {"hole", two("[2,2]", "[4]", "[20,36]", 36), {u + "expected to begin at 16" + no_gap + "[20, 36]"}},
      {"partial overlap", two("[2,2]", "[4]", "[8,24]", 24), {u + "expected to begin at 16" + no_gap + "[8, 24]"}},
      {"identical overlap", two("[2,2]", "[4]", "[0,16]", 16), {u + "expected to begin at 16" + no_gap + "[0, 16]"}},
      {"empty tensor inside another", two("[2,2]", "[0]", "[8,8]", 16), {u + "expected to begin at 16" + no_gap + "[8, 8]"}},
      {"empty tensor behind the end", two("[2,2]", "[0]", "[20,20]", 16), {u + "expected to begin at 16" + no_gap + "[20, 20]"}},
      {"more bytes than its shape",
       one_tensor(R"("I32")", "[2,2]", "[0,20]", 20),
       {t + "expected the 16 bytes of its dtype and shape, got data_offsets [0, 20]"}},
      {"fewer bytes than its shape",
       one_tensor(R"("I32")", "[2,2]", "[0,12]", 12),
       {t + "expected the 16 bytes of its dtype and shape, got data_offsets [0, 12]"}},
      {"bytes of an empty shape", one_tensor(R"("I32")", "[2,0]", "[0,16]", 16), {t + "expected the 0 bytes of its dtype and shape"}},
  };
}

inline std::vector<SafetensorsProbe> malformed_file_sizes() {
  const std::string good = safetensors_bytes(good_header(), 16);
  const std::string three = "{" + described("t", R"("U8")", "[4]", "[0,4]") + "," + described("u", R"("U8")", "[4]", "[4,8]") + "," +
                            described("v", R"("U8")", "[4]", "[8,12]") + "}";
  const auto cut = [](const std::string& tensor, const std::string& data, const std::string& offsets, const std::string& missing) {
    return "header: tensor \"" + tensor + "\": expected to end within the " + data + " bytes of data, got data_offsets " + offsets +
           "; bytes missing at the end of the file: " + missing + " (a truncated download?)";
  };
  return {
      {"end past the end of the file", one_tensor(R"("I32")", "[2,3]", "[0,24]", 16), {cut("t", "16", "[0, 24]", "8")}},
      {"truncated by a byte", good.substr(0, good.size() - 1), {cut("t", "15", "[0, 16]", "1")}},
      {"no data", good.substr(0, good.size() - 16), {cut("t", "0", "[0, 16]", "16")}},
      {"truncated in the second tensor of three", safetensors_bytes(three, 6), {cut("u", "6", "[4, 8]", "6")}},
      {"much claimed, nothing there",
       one_tensor(R"("U8")", "[281474976710656]", "[0,281474976710656]", 0),
       {cut("t", "0", "[0, 281474976710656]", "281474976710656")}},
      {"a byte too many", good + "x", {"byte 81: expected the end of the file, got bytes that belong to no tensor: 1"}},
      {"more bytes and no tensor",
       safetensors_bytes("{}", 4),
       {"byte 10: expected the end of the file, got bytes that belong to no tensor: 4"}},
  };
}

inline std::vector<SafetensorsProbe> malformed_safetensors() {
  std::vector<SafetensorsProbe> all;
  for (const auto& group : {malformed_sizes(), malformed_encodings(), malformed_json(), malformed_metadata(), malformed_entries(),
                            malformed_shapes(), malformed_offsets(), malformed_file_sizes()}) {
    all.insert(all.end(), group.begin(), group.end());
  }
  return all;
}

/// Files that readers have wrongly refused, and how many tensors each holds.
struct UnusualSafetensors {
  std::string name, bytes;
  std::size_t tensors;
};

inline std::vector<UnusualSafetensors> unusual_safetensors() {
  const std::string header = good_header(), body = header.substr(1);
  const auto text = [](std::string_view json) { return safetensors_bytes(json, 16); };
  const auto with_field = [&](std::string_view field) {
    return text(R"({"t":{)" + std::string(field) + R"(,"dtype":"I32","shape":[2,2],"data_offsets":[0,16]}})");
  };
  const auto named = [](std::string_view name) {
    return safetensors_bytes("{" + described(name, R"("I32")", "[2,2]", "[0,16]") + "}", 16);
  };
  std::string empty_tensors;
  for (int i = 0; i < 1000; ++i) empty_tensors += "," + described("e" + std::to_string(i), R"("F32")", "[0,3]", "[16,16]");
  return {
      {"10 bytes, no tensor", safetensors_bytes("{}", 0), 0},
      {"no tensor, with white space", safetensors_bytes(" { }  ", 0), 0},
      {"metadata alone", safetensors_bytes(R"({"__metadata__":{"format":"pt"}})", 0), 0},
      {"as the reference writes it", text(header + "       "), 1},
      {"length that does not divide by 8", text(header), 1},
      {"white space before", text(" \t\r\n" + header), 1},
      {"white space between", text(R"({ "t" : { "dtype" : "I32" , "shape" : [ 2 , 2 ] , "data_offsets" : [ 0 , 16 ] } })"), 1},
      {"no metadata, as null", text(R"({"__metadata__":null,)" + body), 1},
      {"metadata empty", text(R"({"__metadata__":{},)" + body), 1},
      {"metadata behind", text(header.substr(0, header.size() - 1) + R"(,"__metadata__":{"a":"b"}})"), 1},
      {"unknown field", with_field(R"("extra":1)"), 1},
      {"unknown fields of every kind",
       with_field(R"("a":null,"b":-1.5e3,"c":"x","d":true,"e":[1,[2,{"f":[]}],null],"g":{"dtype":"x","shape":{}},"":0)"), 1},
      {"unknown field, 60 deep", with_field("\"extra\":" + repeated("[", 60) + repeated("]", 60)), 1},
      {"unknown field twice", with_field(R"("extra":1,"extra":2)"), 1},
      {"fields in another order", text(R"({"t":{"data_offsets":[0,16],"shape":[2,2],"dtype":"I32"}})"), 1},
      {"escapes in a key", text(R"({"t":{"\u0064type":"I32","shape":[2,2],"data_offsets":[0,16]}})"), 1},
      {"empty name", named(""), 1},
      {"zero character in a name", named("\\u0000"), 1},
      {"a path as the name", named("../../etc/passwd"), 1},
      {"name of 1 MB", named(std::string(1'000'000, 'n')), 1},
      {"name beyond ASCII", named("Gewichte \xc3\xbc\xf0\x9f\xa4\x97"), 1},
      {"scalar", one_tensor(R"("F32")", "[]", "[0,4]", 4), 1},
      {"empty tensor", one_tensor(R"("F32")", "[0]", "[0,0]", 0), 1},
      {"extents 0, 2^48, 2^48", one_tensor(R"("F32")", "[0,281474976710656,281474976710656]", "[0,0]", 0), 1},
      {"extents 2^48, 2^48, 0", one_tensor(R"("F32")", "[281474976710656,281474976710656,0]", "[0,0]", 0), 1},
      {"64 dimensions", one_tensor(R"("F32")", "[" + repeated("1,", 63) + "4]", "[0,16]", 16), 1},
      {"1000 empty tensors at one place", text(header.substr(0, header.size() - 1) + empty_tensors + "}"), 1001},
      {"empty tensors at both ends and between",
       safetensors_bytes("{" + described("a", R"("F32")", "[0]", "[0,0]") + "," + described("b", R"("U8")", "[3]", "[0,3]") + "," +
                             described("c", R"("F32")", "[0]", "[3,3]") + "," + described("d", R"("U8")", "[2]", "[3,5]") + "," +
                             described("e", R"("F32")", "[0]", "[5,5]") + "}",
                         5),
       5},
      {"header in another order than the data",
       safetensors_bytes("{" + described("a", R"("F32")", "[2]", "[8,16]") + "," + described("b", R"("F32")", "[2]", "[0,8]") + "}", 16),
       2},
      {"F32 at byte 3",
       safetensors_bytes("{" + described("a", R"("U8")", "[3]", "[0,3]") + "," + described("b", R"("F32")", "[2]", "[3,11]") + "}", 11), 2},
      {"eight bits", one_tensor(R"("F8_E4M3")", "[3]", "[0,3]", 3), 1},
      {"six bits", one_tensor(R"("F6_E3M2")", "[4]", "[0,3]", 3), 1},
      {"four bits", one_tensor(R"("F4")", "[3,2]", "[0,3]", 3), 1},
  };
}

}  // namespace dylora::test

#endif
