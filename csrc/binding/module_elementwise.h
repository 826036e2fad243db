#pragma once

#include <nanobind/nanobind.h>

void bind_elementwise(nanobind::module_& m);
