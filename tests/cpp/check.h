#pragma once

// A test is a function that calls expect(). Failures are printed and counted; main() returns 1 if there are any.

#include <iostream>
#include <string>

inline int failures = 0;

inline void expect(bool holds, const std::string& what) {
  if (holds) return;
  ++failures;
  std::cerr << "FAILED: " << what << std::endl;
}

// Runs `body`, which has to throw an exception whose message contains `part`.
template <typename F>
void expect_error(F body, const std::string& part) {
  try {
    body();
  } catch (const std::exception& error) {
    expect(std::string(error.what()).find(part) != std::string::npos,
           "error message contains \"" + part + "\", got: " + error.what());
    return;
  }
  expect(false, "an error about \"" + part + "\"");
}
