// All kernels, for the level whose vectors were included before. The standard library's headers come first and are
// compiled for every processor: only what is marked as the level's uses its instructions.

#pragma once

#include "levels.h"
#include "numbers.h"

#include "attention.h"
#include "best.h"
#include "draw.h"
#include "elementwise.h"
#include "encode.h"
#include "products.h"

namespace unspool::UNSPOOL_LEVEL {

const Kernels kernels{elementwise::rms_norm, elementwise::norm_parts, elementwise::add,
                      elementwise::greatest, elementwise::silu_gate,  elementwise::turn, attention::attend,
                      encoding::encode,      UNSPOOL_LINEAR,          UNSPOOL_QUANTISED, drawing::draw,
                      drawing::draw_seeded,  sorting::keep_best,      sorting::best};

}  // namespace unspool::UNSPOOL_LEVEL
