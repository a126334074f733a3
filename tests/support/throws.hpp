#ifndef DYLORA_TESTS_SUPPORT_THROWS_HPP
#define DYLORA_TESTS_SUPPORT_THROWS_HPP

#include <exception>
#include <initializer_list>
#include <string>
#include <string_view>
#include <typeinfo>

namespace dylora::test {

/// Runs `call` and says what is wrong with what it threw: nothing (an empty string) if it is exactly an `Error` whose message holds all the
/// parts.
template <class Error, class Call>
std::string wrong_throw(Call&& call, std::initializer_list<std::string_view> parts) {
  try {
    call();
  } catch (const Error& error) {
    if (typeid(error) != typeid(Error)) return std::string("another type was thrown: ") + typeid(error).name();
    const std::string message = error.what();
    for (const std::string_view part : parts) {
      if (message.find(part) == std::string::npos) return "\"" + std::string(part) + "\" is missing in: " + message;
    }
    return "";
  } catch (const std::exception& error) {
    return std::string("another type was thrown: ") + error.what();
  }
  return "nothing was thrown";
}

}  // namespace dylora::test

/// The call throws an exception of exactly this type, whose message holds all of these parts.
#define CHECK_THROWS_SAYING(Error, call, ...) CHECK(dylora::test::wrong_throw<Error>([&] { (void)(call); }, {__VA_ARGS__}) == "")

#endif
