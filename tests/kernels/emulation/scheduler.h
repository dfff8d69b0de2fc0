#pragma once

#include <cstdint>
#include <string>

namespace emulation {

void seed(uint64_t value);   // of the order of blocks and threads; forgets an error
const std::string& error();  // what went wrong since, or empty

void keep_resident(int blocks);  // from now on this many at once; 0: a random number
uint64_t rounds();               // since seed(), how often no thread could go on but those that poll
uint64_t random_number();

}  // namespace emulation
