// What a function of the C ABI takes, written down by the compiler in the library itself: "il" for
// an int and an int64_t. A caller that was made for other sources finds out before it calls.
#pragma once

#include <array>
#include <cstdint>
#include <type_traits>

namespace fastpost {

template <class T>
constexpr char argument_code() {
  if constexpr (std::is_pointer_v<T>) return 'p';
  if constexpr (std::is_same_v<T, int>) return 'i';
  if constexpr (std::is_same_v<T, int64_t>) return 'l';
  if constexpr (std::is_same_v<T, float>) return 'f';
  return 0;
}

template <class Result, class... Arguments>
constexpr std::array<char, sizeof...(Arguments) + 1> arguments_of(Result (*)(Arguments...)) {
  static_assert(((argument_code<Arguments>() != 0) && ...), "give this type a letter");
  return {argument_code<Arguments>()..., '\0'};
}

}  // namespace fastpost

// After the definition of an exported function, once.
#define FASTPOST_ARGUMENTS(function)                                                            \
  extern "C" __attribute__((visibility("default")))                                             \
  const decltype(fastpost::arguments_of(function)) function##_arguments;                        \
  const decltype(fastpost::arguments_of(function)) function##_arguments =                       \
      fastpost::arguments_of(function);
