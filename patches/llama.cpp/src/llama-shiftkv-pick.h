#pragma once

#include "llama-shiftkv-score.h"

// the kept tokens of a layer by the scores on its device, so that nothing but them comes back: into s.skv.sel.
// false if scores are NaN. throws std::runtime_error
bool llama_shiftkv_pick(llama_shiftkv_scoring & s);
