#pragma once

#include <cstdint>
#include <string>

namespace emulation {

void seed(uint64_t value);   // of the order of blocks and threads; forgets an error
const std::string& error();  // what went wrong since, or empty

}  // namespace emulation
