#pragma once
#include <nanobind/nanobind.h>

void bind_losses(nanobind::module_& m);
