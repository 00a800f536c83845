// Few-shot action recognition with a package of `amd-fast export`, without Python.
//
//   predict PACKAGE EPISODE.safetensors
//
// The episode holds one tensor per input of the encoder (a clip tensor per modality and `present`), the clips of the support first, and
// `support_labels`. Prints the probability of every class, and the trust in every view, for the clips after the support. Where the episode
// also holds `expected.log_probs`, as those of a package do, the result is compared with it.

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <c10/util/Exception.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <fstream>
#include <iterator>
#include <map>
#include <regex>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

using torch::inductor::AOTIModelPackageLoader;
using Tensors = std::map<std::string, at::Tensor>;

constexpr double kTolerance = 1e-3;  // of log-probabilities; compiled programs may sum in another order

// All tensors of a safetensors file: eight bytes with the length of a JSON header, the header, the data.
Tensors read_safetensors(const std::string& path) {
  static const std::map<std::string, at::ScalarType> types{{"F32", at::kFloat}, {"I64", at::kLong}, {"BOOL", at::kBool}};
  // Every entry as the safetensors library writes it.
  static const std::regex entry(R"re("([^"]+)":\{"dtype":"(\w+)","shape":\[([\d,]*)\],"data_offsets":\[(\d+),(\d+)\]\})re");
  std::ifstream file(path, std::ios::binary);
  std::uint64_t length = 0;
  file.read(reinterpret_cast<char*>(&length), sizeof length);
  std::string header, data;
  if (file && length < (1u << 24)) {
    header.resize(length);
    file.read(header.data(), static_cast<std::streamsize>(length));
    data.assign(std::istreambuf_iterator<char>(file), {});
  }
  Tensors tensors;
  for (std::sregex_iterator found(header.begin(), header.end(), entry), end; found != end; ++found) {
    const std::smatch& match = *found;
    std::vector<std::int64_t> shape;
    std::istringstream sizes(match[3]);
    for (std::string size; std::getline(sizes, size, ',');) shape.push_back(std::stoll(size));
    const std::size_t from = std::stoull(match[4]), to = std::stoull(match[5]);
    const auto type = types.find(match[2]);
    if (type == types.end() || from > to || to > data.size()) throw std::runtime_error(path + ": cannot read the tensor " + match[1].str());
    at::Tensor tensor = at::empty(shape, at::TensorOptions(type->second));
    if (tensor.nbytes() != to - from) throw std::runtime_error(path + ": the tensor " + match[1].str() + " has another size than its shape");
    std::copy(data.begin() + from, data.begin() + to, static_cast<char*>(tensor.data_ptr()));
    tensors.emplace(match[1], tensor);
  }
  if (tensors.empty()) throw std::runtime_error(path + " is no safetensors file");
  return tensors;
}

at::Tensor get(const Tensors& tensors, const std::string& name) {
  const auto found = tensors.find(name);
  if (found == tensors.end()) throw std::runtime_error("the episode lacks the tensor " + name);
  return found->second;
}

int predict(const std::string& package, const std::string& path) {
  const c10::InferenceMode guard;
  AOTIModelPackageLoader encoder(package + "/encoder.pt2"), head(package + "/head.pt2");
  const auto metadata = encoder.get_metadata();
  const at::Device device(metadata.at("device"));
  const Tensors episode = read_safetensors(path);

  // Clips to tokens. A program that enrols clips keeps these of the support, and encodes each new clip by itself.
  std::vector<at::Tensor> clips;
  std::istringstream names(metadata.at("inputs"));
  for (std::string name; names >> name;) clips.push_back(get(episode, name).to(device));
  const std::vector<at::Tensor> encoded = encoder.run(clips);
  const at::Tensor &tokens = encoded.at(0), &log_weight = encoded.at(1);

  // Tokens of support and queries to probabilities.
  const at::Tensor labels = get(episode, "support_labels").to(device);
  const std::int64_t shots = labels.size(0), classes = labels.max().item<std::int64_t>() + 1;
  const std::vector<at::Tensor> answer = head.run(
      {tokens.slice(0, 0, shots),
       log_weight.slice(0, 0, shots),
       labels,
       tokens.slice(0, shots),
       log_weight.slice(0, shots),
       at::arange(classes, labels.options())});
  const at::Tensor log_probs = answer.at(0).cpu(), policy = answer.at(2).cpu();

  for (std::int64_t query = 0; query < log_probs.size(0); ++query) {
    std::printf("clip %lld:", static_cast<long long>(query));
    for (std::int64_t k = 0; k < classes; ++k) std::printf(" %.6f", log_probs[query][k].exp().item<double>());
    std::printf("  trust:");
    for (std::int64_t view = 0; view < policy.size(1); ++view) std::printf(" %.6f", policy[query][view].item<double>());
    std::printf("\n");
  }
  if (episode.count("expected.log_probs") == 0) return 0;
  const double off = (log_probs - episode.at("expected.log_probs")).abs().max().item<double>();
  std::printf("largest difference from the recorded log-probabilities: %.1e\n", off);
  return off <= kTolerance ? 0 : 1;
}

int main(int count, char** arguments) {
  if (count != 3) {
    std::fprintf(stderr, "usage: predict PACKAGE EPISODE.safetensors\n");
    return 2;
  }
  try {
    return predict(arguments[1], arguments[2]);
  } catch (const c10::Error& error) {
    std::fprintf(stderr, "error: %s\n", error.what_without_backtrace());
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 2;
  }
}
