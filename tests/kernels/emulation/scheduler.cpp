// Runs a grid: takes blocks in random order, a few at a time, and runs a random runnable fiber. After most barriers
// one thread of the block is late: it goes on when no other thread of any block can. All threads that poll go on when not even that
// one can.
#include <ucontext.h>
#include <algorithm>
#include <csetjmp>
#include <cstdio>
#include <deque>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda_emulation.h"
#include "scheduler.h"

namespace emulation {

Index thread_index, block_index, block_dim, grid_dim;

namespace {

constexpr int MAX_THREADS = 256, MAX_RESIDENT = 4;
constexpr size_t STACK = 64 * 1024, GUARD = 64;
constexpr int POISON = 0xff, CANARY = 0xa5;

enum State { IDLE, READY, AT_BARRIER, IN_WARP, DONE };

// Shared memory between two canaries.
struct Region {
  std::string site;
  std::vector<unsigned char> bytes;

  Region(const char* site, size_t n) : site(site), bytes(n + 2 * GUARD, CANARY) { std::memset(data(), POISON, n); }
  unsigned char* data() { return bytes.data() + GUARD; }
  size_t size() const { return bytes.size() - 2 * GUARD; }
  bool intact() const {
    for (size_t i = 0; i < GUARD; ++i) {
      if (bytes[i] != CANARY || bytes[bytes.size() - 1 - i] != CANARY) return false;
    }
    return true;
  }
};

struct Meeting {  // of threads at one place in the source
  int arrived = 0;
  std::string site;
};

struct Warp {
  Meeting meetings[2];  // a lane is at most one exchange ahead of the others: two sets of words suffice
  uint64_t words[2][32];
};

struct Block {
  unsigned index = 0;
  int left = 0;
  Meeting barrier;
  std::vector<Warp> warps;
  std::vector<std::unique_ptr<Region>> regions;  // [0] is the dynamic one
};

struct Fiber {
  ucontext_t entry;
  jmp_buf context;
  std::vector<char> stack;
  bool started = false;
  State state = IDLE;
  int slot = 0;  // of its block
  unsigned thread = 0;
  uint64_t priority = 0;
  int exchanges = 0;
};

std::mt19937_64 random_bits;
std::string failure;
jmp_buf scheduler;
std::deque<Fiber> fibers;   // MAX_THREADS of each slot
std::vector<Block> blocks;  // by slot
std::vector<Fiber*> ready;  // a heap
std::vector<Fiber*> polling;
uint64_t rounds_of_polling = 0;
int kept_resident = 0;
Fiber* running = nullptr;
const std::function<void()>* kernel_of_grid = nullptr;

Block& block() { return blocks[running->slot]; }

void wait(State state) {
  running->state = state;
  if (_setjmp(running->context) == 0) _longjmp(scheduler, 1);
}

bool lower(const Fiber* a, const Fiber* b) { return a->priority < b->priority; }

void wake(Fiber& fiber, bool late = false) {
  fiber.state = READY;
  fiber.priority = late ? 0 : random_bits();
  ready.push_back(&fiber);
  std::push_heap(ready.begin(), ready.end(), lower);
}

bool wake_polling() {
  ++rounds_of_polling;
  for (Fiber* fiber : polling) wake(*fiber);
  polling.clear();
  return !ready.empty();
}

// The first fields of the struct in which g++ describes an access.
struct Access {
  const char* file;
  uint32_t line, column;
  const void* type;
  unsigned char log_alignment, kind;
};

// Threads that meet must be at the same place.
void arrive(Meeting& meeting, const char* site) {
  if (meeting.arrived++ == 0) meeting.site = site;
  if (meeting.site != site) fail("divergent: threads meet at " + meeting.site + " and at " + site);
}

void fiber_main() {
  for (;;) {
    (*kernel_of_grid)();
    --block().left;
    wait(DONE);
  }
}

void resume(Fiber& fiber) {
  running = &fiber;
  thread_index.x = fiber.thread;
  block_index.x = blocks[fiber.slot].index;
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.context, 1);
  fiber.started = true;
  fiber.stack.resize(STACK);
  getcontext(&fiber.entry);
  fiber.entry.uc_stack.ss_sp = fiber.stack.data();
  fiber.entry.uc_stack.ss_size = STACK;
  fiber.entry.uc_link = nullptr;
  makecontext(&fiber.entry, fiber_main, 0);
  setcontext(&fiber.entry);
}

void admit(int slot, unsigned index, int threads, int shared_bytes) {
  Block& b = blocks[slot];
  b = Block();
  b.index = index;
  b.left = threads;
  b.warps.resize(threads / 32);
  b.regions.push_back(std::make_unique<Region>("dynamic shared memory", shared_bytes));
  for (int t = 0; t < threads; ++t) {
    Fiber& fiber = fibers[slot * MAX_THREADS + t];
    fiber.slot = slot;
    fiber.thread = t;
    fiber.exchanges = 0;
    wake(fiber);
  }
}

// Threads that wait forever: some have left, or wait elsewhere.
std::string stuck(int threads) {
  std::string message = "divergent:";
  for (size_t slot = 0; slot < blocks.size(); ++slot) {
    if (blocks[slot].left == 0) continue;
    int count[5] = {};
    for (int t = 0; t < threads; ++t) ++count[fibers[slot * MAX_THREADS + t].state];
    message += " in block " + std::to_string(blocks[slot].index) + " " + std::to_string(count[AT_BARRIER]) +
               " threads wait at the barrier " + blocks[slot].barrier.site + ", " + std::to_string(count[IN_WARP]) +
               " in a warp operation, " + std::to_string(count[DONE]) + " have left;";
  }
  return message;
}

}  // namespace

void seed(uint64_t value) {
  random_bits.seed(value);
  failure.clear();
  rounds_of_polling = 0;
}

const std::string& error() { return failure; }

void keep_resident(int number) { kept_resident = number; }
uint64_t rounds() { return rounds_of_polling; }
uint64_t random_number() { return random_bits(); }

void fail(const std::string& message) {
  if (failure.empty()) failure = message;
  _longjmp(scheduler, 1);
}

void launch(int grid, int threads, int shared_bytes, const std::function<void()>& kernel) {
  if (grid < 1 || threads < 32 || threads > MAX_THREADS || threads % 32 != 0) {
    failure = "invalid launch: " + std::to_string(grid) + " blocks of " + std::to_string(threads) + " threads";
    return;
  }
  kernel_of_grid = &kernel;
  grid_dim.x = grid;
  block_dim.x = threads;
  std::vector<unsigned> order(grid);
  for (int i = 0; i < grid; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), random_bits);
  ready.clear();
  polling.clear();
  const int resident = std::min(kept_resident ? kept_resident : 1 + int(random_bits() % MAX_RESIDENT), grid);
  blocks = std::vector<Block>(resident);
  if (fibers.size() < size_t(resident * MAX_THREADS)) fibers.resize(resident * MAX_THREADS);
  for (int slot = 0; slot < resident; ++slot) {
    admit(slot, order.back(), threads, shared_bytes);
    order.pop_back();
  }
  while (failure.empty() && (!ready.empty() || wake_polling())) {
    std::pop_heap(ready.begin(), ready.end(), lower);
    Fiber& fiber = *ready.back();
    ready.pop_back();
    resume(fiber);
    if (fiber.state != DONE || blocks[fiber.slot].left > 0) continue;
    for (const auto& region : blocks[fiber.slot].regions) {
      if (!region->intact()) failure = "shared memory written out of bounds: " + region->site;
    }
    if (!order.empty()) {
      admit(fiber.slot, order.back(), threads, shared_bytes);
      order.pop_back();
    }
  }
  for (const Block& b : blocks) {
    if (failure.empty() && b.left > 0) failure = stuck(threads);
  }
  // What is left on the stacks of stuck fibers is dropped.
  if (!failure.empty()) {
    for (Fiber& fiber : fibers) fiber.started = false;
  }
}

void* shared(const char* site, size_t bytes) {
  for (auto& region : block().regions) {
    if (region->site == site) return region->data();
  }
  block().regions.push_back(std::make_unique<Region>(site, bytes));
  return block().regions.back()->data();
}

void* dynamic_shared() { return block().regions[0]->data(); }

size_t dynamic_shared_bytes() { return block().regions[0]->size(); }

void barrier(const char* site) {
  Block& b = block();
  arrive(b.barrier, site);
  if (b.barrier.arrived < int(block_dim.x)) return wait(AT_BARRIER);
  b.barrier.arrived = 0;
  // The late thread is often one of the first warp, whose threads have the most to do after a barrier.
  const unsigned draw = random_bits() % (2 * block_dim.x), late = draw % 4 == 0 ? draw / 4 % 32 : draw;
  for (unsigned t = 0; t < block_dim.x; ++t) wake(fibers[running->slot * MAX_THREADS + t], t == late);
  wait(READY);
}

const uint64_t* exchange(const char* site, unsigned mask, uint64_t word) {
  if (mask != 0xffffffffu) fail(std::string("only full masks are emulated: ") + site);
  Warp& warp = block().warps[running->thread / 32];
  const int parity = running->exchanges++ % 2;
  Meeting& meeting = warp.meetings[parity];
  warp.words[parity][running->thread % 32] = word;
  arrive(meeting, site);
  if (meeting.arrived < 32) {
    wait(IN_WARP);
  } else {
    meeting.arrived = 0;
    const int first = running->slot * MAX_THREADS + running->thread / 32 * 32;
    for (int lane = 0; lane < 32; ++lane) {
      if (&fibers[first + lane] != running) wake(fibers[first + lane]);
    }
  }
  return warp.words[parity];
}

void yield() {
  wake(*running);
  wait(READY);
}

void pause() {
  polling.push_back(running);
  wait(READY);
}

}  // namespace emulation

// g++ calls this before an access that is not as aligned as its type (-fsanitize=alignment), instead of the sanitizer's own library:
// on a GPU such an access ends the kernel.
extern "C" void __ubsan_handle_type_mismatch_v1(const emulation::Access* access, uintptr_t address) {
  emulation::fail("misaligned: address % " + std::to_string(1 << access->log_alignment) + " is " +
                  std::to_string(address % (1 << access->log_alignment)) + " at " + access->file + ":" + std::to_string(access->line));
}
