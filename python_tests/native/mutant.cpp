#include "mutant.h"

static int chosen = 0;

bool on_cpu::mutant(int number) {
  return number == chosen;
}

extern "C" [[gnu::visibility("default")]] void on_cpu_mutant(int number) {
  chosen = number;
}
