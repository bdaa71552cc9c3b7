// Included before everything where mutants are built: every change that a mutant makes to the sources is
// there beside what it changes, and this chooses.
#pragma once

namespace on_cpu {

[[gnu::const, gnu::visibility("default")]] bool mutant(int number);

}  // namespace on_cpu
