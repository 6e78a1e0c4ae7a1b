// Runs the decode kernel on the host. Every argument is a folder: "case" holds the numbers below,
// "x", "weight", "a", "b" and "bias" what their tensors span in memory; "y" and "s" are written.
#include <fstream>
#include <iterator>
#include <map>
#include <string>

#include "decode.cuh"

namespace {

struct Folder {
  std::string path;
  std::map<std::string, double> numbers;

  explicit Folder(std::string from) : path(std::move(from)) {
    std::ifstream file(path + "/case");
    std::string name;
    double value;
    while (file >> name >> value) numbers[name] = value;
  }

  int64_t number(const char* name) const { return static_cast<int64_t>(numbers.at(name)); }

  // Of exactly the file's size, so that the sanitizers see a step outside.
  void* read(const char* name) const {
    std::ifstream file(path + "/" + name, std::ios::binary);
    if (!file) return nullptr;
    const std::string text{std::istreambuf_iterator<char>(file), {}};
    void* const memory = std::malloc(text.size());
    std::memcpy(memory, text.data(), text.size());
    return memory;
  }

  void write(const char* name, void* data, size_t bytes) const {
    if (data != nullptr)
      std::ofstream(path + "/" + name, std::ios::binary).write(static_cast<char*>(data), bytes);
    std::free(data);
  }
};

void* poisoned(size_t bytes) {
  void* const memory = std::malloc(bytes);
  std::memset(memory, 0xff, bytes);
  return memory;
}

template <typename T, typename A, int TILES, int HALVES>
void launch(const lora::DecodeArguments& arguments, int threads, int cluster) {
  using Shape = lora::DecodeShape<TILES, HALVES>;
  const int tiles = (arguments.N + Shape::kRows - 1) / Shape::kRows;
  lora::run_grid((tiles + cluster - 1) / cluster * cluster, threads, cluster,
                 Shape::shared_bytes(threads),
                 [&] { lora::decode_kernel<T, A, TILES, HALVES>(arguments); });
}

template <typename T, typename A>
void launch(const lora::DecodeArguments& arguments, int rows, int threads, int cluster) {
  const bool few = arguments.M <= 8;
  if (rows == 16 && few) return launch<T, A, 1, 1>(arguments, threads, cluster);
  if (rows == 16) return launch<T, A, 1, 2>(arguments, threads, cluster);
  if (few) return launch<T, A, 2, 1>(arguments, threads, cluster);
  launch<T, A, 2, 2>(arguments, threads, cluster);
}

void run(const Folder& folder) {
  lora::DecodeArguments arguments{};
  void* const x = folder.read("x");
  void* const weight = folder.read("weight");
  void* const a = folder.read("a");
  void* const b = folder.read("b");
  void* const bias = folder.read("bias");
  arguments.x = x;
  arguments.weight = weight;
  arguments.a = a;
  arguments.b = b;
  arguments.bias = bias;
  const int M = arguments.M = folder.number("M");
  const int N = arguments.N = folder.number("N");
  arguments.K = folder.number("K");
  const int r = arguments.r = folder.number("r");
  arguments.x_row = folder.number("x_row");
  arguments.weight_row = folder.number("weight_row");
  arguments.a_row = folder.number("a_row");
  arguments.b_row = folder.number("b_row");
  arguments.b_column = folder.number("b_column");
  arguments.bias_stride = folder.number("bias_stride");
  arguments.scale = folder.numbers.at("scale");
  arguments.high = folder.numbers.at("high");
  arguments.b_is_float = folder.number("b_is_float");
  arguments.bias_is_float = folder.number("bias_is_float");
  arguments.y = poisoned(2 * M * N);
  arguments.s = folder.number("save_s") ? poisoned(2 * M * r) : nullptr;
  const int rows = folder.number("rows"), threads = 32 * folder.number("warps");
  const int cluster = folder.number("cluster");
  const bool wide = folder.number("a_is_float");
  if (folder.number("half")) {
    if (wide) launch<__half, float>(arguments, rows, threads, cluster);
    else launch<__half, __half>(arguments, rows, threads, cluster);
  } else {
    if (wide) launch<__nv_bfloat16, float>(arguments, rows, threads, cluster);
    else launch<__nv_bfloat16, __nv_bfloat16>(arguments, rows, threads, cluster);
  }
  for (void* memory : {x, weight, a, b, bias}) std::free(memory);
  folder.write("y", arguments.y, 2 * M * N);
  folder.write("s", arguments.s, 2 * M * r);
}

}  // namespace

int main(int count, char** folders) {
  for (int i = 1; i < count; ++i) run(Folder(folders[i]));
}
