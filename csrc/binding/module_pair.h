#pragma once

#include <nanobind/nanobind.h>

void bind_pair(nanobind::module_& m);  // the two-row kernels
