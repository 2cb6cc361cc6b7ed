// Stand-in for CANN's header of the same name.
#pragma once

#include "exe_graph/runtime/context.h"
