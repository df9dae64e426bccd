// What the programs are called with, and their launchers: read by nvcc and by the C++ compiler.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../constants.h"

namespace fastode::cuda {

// Where a program is launched: a card, and a stream on it.
struct Queue {
  int device = 0;
  void* stream = nullptr;
};

struct Map {
  void* data;
  int64_t sample, channel, row, column;  // strides, in elements
};

// norm, activation, 3×3 convolution without stride; absent tensors are null. All of the maps' dtype.
struct Unit {
  int norm, groups, activation;  // codes of constants.h; without a norm, groups is 1
  float eps, p, q;
  const void *norm_weight, *norm_bias, *mean, *variance;
  const void* weight;
  const void* bias;
  int64_t weight_strides[4];
};

struct Branch {
  int count;
  Unit unit[kMostUnits];
  // Mean and rstd of every norm: [evaluation][unit][sample][2][channels]; null where no pull-back reads them.
  float* statistics;
};

// A place for a map of each sample in the order of threads, by number; -1: none.
struct Room {
  char* data;
  int64_t samples;
};

struct SchemeCall {
  int samples, stages;
  Branch branch;
  Map x, result;  // backward: the cotangent, and that of x
  Room room;
  // Learned coefficients stay on the card, [2][stages][stages]; null where those of `alpha` and `beta` hold.
  const double* table;
  float alpha[kMostStages][kMostStages], beta[kMostStages][kMostStages];
  int point[kMostStages];              // where u_k lies
  int image[kMostStages];              // where f(u_k) lies
  int input[kMostStages][kMostUnits];  // where the input of each unit lies in the evaluation at u_k
  int bar[kMostStages + 1];            // where the cotangent of u_k lies
};

// What the parameters' gradients are made of, beside what the forward kept.
struct Left {
  Room room;                               // of the cotangents of the convolutions
  int cotangent[kMostStages][kMostUnits];  // where they lie; -1 of a stage that is not evaluated
  float* sums;                             // of the norms, [block][unit][bias, weight][channels]; null: none is wanted
};

struct BackwardCall {
  SchemeCall scheme;
  Left left;
};

// The gradients of the convolutions' parameters, from what a backward left.
struct WeightsCall {
  BackwardCall backward;
  float* partial;  // [block / units][unit][9 · channels² as (tap, in, out), then channels of the bias]
};

// A unit's gradients: contiguous, of the maps' dtype; null where the parameter is absent.
struct UnitGradients {
  void *norm_weight, *norm_bias, *weight, *bias;
};

struct FinishCall {
  int units, channels;
  const float *partial, *sums;
  int partial_rows, sums_rows;
  UnitGradients unit[kMostUnits];
};

struct DescentCall {
  int samples, steps;
  float step_size, theta;
  Branch branch;
  Map x, result;
  Room room;
  int start, skip, point, residual;  // where x, f(x), y and the residual lie
  int input[kMostUnits];             // where the inputs of the units lie
};

enum class Type { kBFloat16, kFloat16 };

// What is compiled for a card: maps of these channels and sides.
struct Shape {
  int channels, side;
};

// The bytes of a sample's map in the order of threads.
size_t kept_bytes(Shape shape);

// Null, or why the program was not launched.
const char* scheme_forward(Type type, Shape shape, const SchemeCall& call, const Queue& queue);
const char* scheme_backward(Type type, Shape shape, const BackwardCall& call, const Queue& queue);
const char* weight_gradients(Type type, Shape shape, const WeightsCall& call, const Queue& queue);
const char* finish_gradients(Type type, const FinishCall& call, const Queue& queue);
const char* descent_forward(Type type, Shape shape, const DescentCall& call, const Queue& queue);

// How many blocks a launch of these programs will have.
int scheme_backward_blocks(Type type, Shape shape, const BackwardCall& call, const Queue& queue);
int weight_gradients_blocks(Type type, Shape shape, const WeightsCall& call, const Queue& queue);

}  // namespace fastode::cuda
