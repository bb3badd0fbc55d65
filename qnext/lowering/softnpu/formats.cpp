// Private formats: FRACTAL_NZ is laid out here as on the chip, so that whoever reads it as a plain
// matrix reads nonsense. The package casts formats by the way of the days before aclnn: descriptions
// of tensors, buffers, and the operator Identity. No other operator is taken that way.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))
typedef int Status;
enum { OK = 0, UNSUPPORTED = 500002, NZ = 29 };
enum { ROWS = 16, BLOCK_BYTES = 32 }; // a block of the cube unit: 16 rows of 32 bytes
API Status softnpu_issue(void *stream, const char *name, Status (*run)(void *), void (*drop)(void *), void *argument);

struct Description { int dtype, format; std::vector<int64_t> shape; };
struct Buffer { char *data; size_t size; };
API Description *aclCreateTensorDesc(int dtype, int rank, const int64_t *shape, int format) {
  return new Description{dtype, format, std::vector<int64_t>(shape, shape + rank)};
}
API void aclDestroyTensorDesc(Description *d) { delete d; }
API Status aclSetTensorFormat(Description *d, int format) { d->format = format; return OK; } // how it is stored;
API Status aclSetTensorShape(Description *, int, const int64_t *) { return OK; } // the stored shape follows from both
API Buffer *aclCreateDataBuffer(void *data, size_t size) { return new Buffer{(char *)data, size}; }
API Status aclDestroyDataBuffer(Buffer *b) { delete b; return OK; }

static int64_t size_of(int dtype) { // of those that weights have
  switch (dtype) {
  case 0: case 3: return 4; // float32, int32
  case 1: case 27: return 2; // float16, bfloat16
  case 2: case 4: case 12: return 1; // int8, uint8, bool
  default: return 0;
  }
}
struct Cast { Description from, to; Buffer source, target; };

// copies between rows in order and blocks of 16 rows by 32 bytes, column of blocks by column
static void reorder(const Cast &cast, bool to_blocks) {
  const auto &shape = cast.from.shape;
  const int64_t item = size_of(cast.from.dtype), width = BLOCK_BYTES / item;
  const int64_t rows = shape[shape.size() - 2], columns = shape.back();
  int64_t matrices = 1;
  for (size_t i = 0; i + 2 < shape.size(); ++i) matrices *= shape[i];
  const int64_t down = (rows + ROWS - 1) / ROWS, across = (columns + width - 1) / width;
  const int64_t plain = rows * columns * item, blocked = down * across * ROWS * BLOCK_BYTES;
  if (to_blocks) memset(cast.target.data, 0, matrices * blocked);
  for (int64_t m = 0; m < matrices; ++m)
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < columns; c += width) {
        const int64_t run = (columns - c < width ? columns - c : width) * item;
        const int64_t there = m * blocked + ((c / width * down + r / ROWS) * ROWS + r % ROWS) * BLOCK_BYTES;
        const int64_t here = m * plain + (r * columns + c) * item;
        if (to_blocks) memcpy(cast.target.data + there, cast.source.data + here, run);
        else memcpy(cast.target.data + here, cast.source.data + there, run);
      }
}
static Status run(void *argument) {
  const Cast &cast = *(Cast *)argument;
  const bool from = cast.from.format == NZ, to = cast.to.format == NZ;
  if (from == to) memcpy(cast.target.data, cast.source.data, std::min(cast.source.size, cast.target.size));
  else reorder(cast, to);
  return OK;
}
API Status aclopCompileAndExecute(
    const char *name, int inputs, const Description *const from[], const Buffer *const sources[], int outputs,
    const Description *const to[], Buffer *const targets[], const void *, int, int, const char *, void *stream) {
  const bool known = !strcmp(name, "Identity") && inputs == 1 && outputs == 1 && from[0] && to[0];
  if (!known || from[0]->shape.size() < 2 || !size_of(from[0]->dtype)) {
    // a stub that returned 0 would hand back memory nobody wrote
    fprintf(stderr, "softnpu: %s took the legacy path, which casts formats here and nothing else\n", name);
    return UNSUPPORTED;
  }
  auto *cast = new Cast{*from[0], *to[0], *sources[0], *targets[0]};
  return softnpu_issue(stream, "Identity", run, [](void *a) { delete (Cast *)a; }, cast);
}
