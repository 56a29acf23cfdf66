// The model as step.cu finds it: a table of addresses in global memory, which fused_step.py makes.

#pragma once

#include "fragments.cuh"

struct Linear {
  const char* weight;
  const void* scales;
  const u16* bias;
};

struct Norm {
  const u16 *weight, *bias;
};

struct Layer {
  Linear qkv, dense, fc, proj;
  Norm input_norm, post_norm;
};

struct Model {
  Layer layers[LAYERS];
  Linear head;
  Norm final_norm;
  const u16 *embedding, *positions;
};
