// Runs one engine of target aoti-* without Python: reads its inputs as raw arrays, writes its first output likewise.
//
//   run_aoti PACKAGE.pt2 DEVICE OUTPUT.bin  DTYPE SHAPE FILE.bin  [DTYPE SHAPE FILE.bin ...]
//   run_aoti vae_decoder-fp32.pt2 cuda image.bin  float32 1,4,16,16 latent.bin
//
// Inputs in the order of bundle.json. Build against libtorch; docs/export.md has the command.

#include <fstream>
#include <iostream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include <ATen/Context.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

namespace {

std::vector<int64_t> parse_shape(const std::string& text) {
  std::vector<int64_t> shape;
  std::stringstream parts(text);
  for (std::string part; std::getline(parts, part, ',');) shape.push_back(std::stoll(part));
  return shape;
}

torch::Tensor read_tensor(const std::string& dtype, const std::string& shape, const std::string& path) {
  if (dtype != "float32" && dtype != "int64") throw std::runtime_error("dtype " + dtype + "; give float32 or int64");
  auto tensor = torch::empty(parse_shape(shape), dtype == "int64" ? torch::kInt64 : torch::kFloat32);
  std::ifstream file(path, std::ios::binary);
  if (!file.read(static_cast<char*>(tensor.data_ptr()), static_cast<std::streamsize>(tensor.nbytes())))
    throw std::runtime_error(path + " holds less than " + std::to_string(tensor.nbytes()) + " bytes");
  return tensor;
}

}  // namespace

int main(int count, char** words) {
  if (count < 7 || (count - 4) % 3 != 0) {
    std::cerr << "usage: run_aoti PACKAGE.pt2 DEVICE OUTPUT.bin DTYPE SHAPE FILE.bin [DTYPE SHAPE FILE.bin ...]\n";
    return 2;
  }
  try {
    const torch::NoGradGuard no_gradients;
    at::globalContext().setAllowTF32CuDNN(false);  // or "fp32" convolutions have the mantissa of fp16
    const torch::Device device(words[2]);
    torch::inductor::AOTIModelPackageLoader model(words[1]);
    std::vector<torch::Tensor> inputs;
    for (int at = 4; at < count; at += 3)
      inputs.push_back(read_tensor(words[at], words[at + 1], words[at + 2]).to(device));
    const auto output = model.run(inputs).at(0).to(torch::kCPU).contiguous();
    std::ofstream file(words[3], std::ios::binary);
    file.write(static_cast<const char*>(output.data_ptr()), static_cast<std::streamsize>(output.nbytes()));
    if (!file.flush()) throw std::runtime_error(std::string(words[3]) + " cannot be written");
    std::cout << "shape " << output.sizes() << "\n";
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << "\n";
    return 1;
  }
}
