#pragma once

#include <nanobind/nanobind.h>

void bind_product(nanobind::module_& m);
