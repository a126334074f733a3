#ifndef DYLORA_EXAMPLES_PROGRAM_HPP
#define DYLORA_EXAMPLES_PROGRAM_HPP

#include <CLI/CLI.hpp>
#include <cstdio>
#include <exception>
#include <string>
#include <type_traits>

/// What a program has around what it does: its options and its exit code.
namespace program {

/// The main of the program `name`: declares and parses the options and calls run(options, app). Returns its exit code: what run returns,
/// or 0 where it returns nothing; 1 for an exception, whose message goes to stderr; CLI11's for options that are refused.
template <class Options, class Run>
int run_main(int argc, char** argv, const char* name, const std::string& what, Options options, void (*declare)(CLI::App&, Options&),
             Run&& run) {
  CLI::App app(what);
  app.option_defaults()->always_capture_default();
  declare(app, options);
  CLI11_PARSE(app, argc, argv);
  try {
    if constexpr (std::is_void_v<decltype(run(options, app))>) {
      run(options, app);
      return 0;
    } else {
      return run(options, app);
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s: %s\n", name, error.what());
    return 1;
  }
}

}  // namespace program

#endif
