#ifndef DYLORA_TESTS_SUPPORT_CATCH_HPP
#define DYLORA_TESTS_SUPPORT_CATCH_HPP

#if __has_include(<catch2/catch_all.hpp>)
#include <catch2/catch_all.hpp>  // version 3
using Catch::Approx;
#else
#include <catch2/catch.hpp>  // version 2
#endif

#endif  // DYLORA_TESTS_SUPPORT_CATCH_HPP
