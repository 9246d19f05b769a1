// How the products differentiate, and what autocast makes of their arguments.
//
// Gradients are products of their own (backward.cpp). Where those have to be differentiated again, they are taken
// from a plain formulation instead.

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace isogrid {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;
using Bias = std::optional<Tensor>;

template <typename Signature>
auto op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

Tensor blocked(const Tensor& x, const Tensor& w, const Bias& bias, int64_t k, bool in, bool out, int64_t features) {
  static auto call = op<Tensor(const Tensor&, const Tensor&, const Bias&, int64_t, bool, bool, int64_t)>("isogrid::blocked");
  return call.call(x, w, bias, k, in, out, features);
}

Tensor two_stage(
    const Tensor& x, const Tensor& first, const Tensor& second, const Bias& bias, at::IntArrayRef blocks, bool runs,
    bool interleave, int64_t features) {
  static auto call = op<Tensor(
      const Tensor&, const Tensor&, const Tensor&, const Bias&, at::IntArrayRef, bool, bool, int64_t)>("isogrid::two_stage");
  return call.call(x, first, second, bias, blocks, runs, interleave, features);
}

Tensor blast(
    const Tensor& x, const Tensor& right, const Tensor& coupling, const Tensor& left, const Bias& bias,
    int64_t features) {
  static auto call =
      op<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Bias&, int64_t)>("isogrid::blast");
  return call.call(x, right, coupling, left, bias, features);
}

// ---- the same in plain terms, which differentiate as often as one likes

Tensor plain_blocked(const Tensor& x, const Tensor& w, int64_t k, bool in, bool out, int64_t features) {
  const int64_t rows = x.size(0), q = w.size(1), p = w.size(2);
  const Tensor whole = at::constant_pad_nd(x, {0, k * p - x.size(1)});
  const Tensor dealt = in ? whole.reshape({rows, p, k}).permute({2, 0, 1}) : whole.reshape({rows, k, p}).transpose(0, 1);
  const Tensor y = at::matmul(dealt, w.mT());  // (k, rows, q)
  return (out ? y.permute({1, 2, 0}) : y.transpose(0, 1)).reshape({rows, k * q}).narrow(1, 0, features);
}

Tensor plain_two_stage(
    const Tensor& x, const Tensor& first, const Tensor& second, at::IntArrayRef blocks, bool runs, bool interleave,
    int64_t features) {
  const int64_t k = blocks[0], l = blocks[1], q = first.size(1);
  Tensor hidden = plain_blocked(x, first, k, false, false, k * q);
  if (runs) hidden = hidden.reshape({x.size(0), k, l, q / l}).transpose(1, 2).reshape({x.size(0), k * q});
  return plain_blocked(hidden, second, l, !runs, interleave, features);
}

Tensor plain_blast(
    const Tensor& x, const Tensor& right, const Tensor& coupling, const Tensor& left, int64_t features) {
  const int64_t rows = x.size(0), b = right.size(0), r = right.size(1);
  const Tensor hidden = plain_blocked(x, right, b, false, false, b * r).reshape({rows, b, r});
  const Tensor mixed = at::matmul(coupling.permute({2, 0, 1}), hidden.permute({2, 1, 0}));  // (rank, row blocks, rows)
  return plain_blocked(mixed.permute({2, 1, 0}).reshape({rows, b * r}), left, b, false, false, features);
}

// ---- what they share: tensors that gradients need, which are wanted, and gradients of gradients

bool differentiates(std::initializer_list<const Tensor*> tensors, const Bias& bias) {
  if (!at::GradMode::is_enabled()) return false;
  for (const Tensor* one : tensors)
    if (one->requires_grad()) return true;
  return bias.has_value() && bias->requires_grad();
}

// Gradients of a plain product with respect to the wanted of its arguments, themselves differentiable.
template <typename Plain>
variable_list again(const Plain& plain, const Tensor& gradient, const variable_list& arguments, at::ArrayRef<bool> wanted) {
  variable_list asked, found(arguments.size());
  for (size_t i = 0; i < arguments.size(); ++i)
    if (wanted[i]) asked.push_back(arguments[i].requires_grad() ? arguments[i] : arguments[i].detach().requires_grad_());
  variable_list given = arguments;
  for (size_t i = 0, n = 0; i < arguments.size(); ++i)
    if (wanted[i]) given[i] = asked[n++];
  const auto gradients = torch::autograd::grad({plain(given)}, asked, {gradient}, std::nullopt, /*create_graph=*/true);
  for (size_t i = 0, n = 0; i < arguments.size(); ++i)
    if (wanted[i]) found[i] = gradients[n++];
  return found;
}

Tensor if_wanted(bool wanted, const Tensor& gradient) {
  return wanted ? gradient : Tensor();
}

// A bias that isn't there has no place among the inputs.
Tensor bias_gradient(AutogradContext* ctx, size_t place, const Tensor& g) {
  return ctx->saved_data["bias"].toBool() && ctx->needs_input_grad(place) ? g.sum(0) : Tensor();
}

struct Blocked : Function<Blocked> {
  static Tensor forward(
      AutogradContext* ctx, const Tensor& x, const Tensor& w, const Bias& bias, int64_t k, bool in, bool out,
      int64_t features) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->saved_data["bias"] = bias.has_value();
    ctx->save_for_backward({x, w});
    ctx->saved_data["blocks"] = k;
    ctx->saved_data["in"] = in;
    ctx->saved_data["out"] = out;
    return blocked(x, w, bias, k, in, out, features);
  }
  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    static auto call = op<std::tuple<Tensor, Tensor>(
        const Tensor&, const Tensor&, const Tensor&, int64_t, bool, bool, std::array<bool, 2>)>("isogrid::blocked_backward");
    const auto saved = ctx->get_saved_variables();
    const Tensor &g = gradients[0], &x = saved[0], &w = saved[1];
    const int64_t k = ctx->saved_data["blocks"].toInt();
    const bool in = ctx->saved_data["in"].toBool(), out = ctx->saved_data["out"].toBool();
    const std::array<bool, 2> wanted{ctx->needs_input_grad(0), ctx->needs_input_grad(1)};
    const Tensor dbias = bias_gradient(ctx, 2, g);
    variable_list found(2);
    if (at::GradMode::is_enabled()) {
      const auto plain = [&](const variable_list& v) { return plain_blocked(v[0], v[1], k, in, out, g.size(1)); };
      found = again(plain, g, {x, w}, wanted);
    } else if (wanted[0] || wanted[1]) {
      const auto [dx, dw] = call.call(g, x, w, k, in, out, wanted);
      found = {if_wanted(wanted[0], dx), if_wanted(wanted[1], dw)};
    }
    return {found[0], found[1], dbias, Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

struct TwoStage : Function<TwoStage> {
  static Tensor forward(
      AutogradContext* ctx, const Tensor& x, const Tensor& first, const Tensor& second, const Bias& bias, int64_t k,
      int64_t l, bool runs, bool interleave, int64_t features) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->saved_data["bias"] = bias.has_value();
    ctx->save_for_backward({x, first, second});
    ctx->saved_data["k"] = k;
    ctx->saved_data["l"] = l;
    ctx->saved_data["runs"] = runs;
    ctx->saved_data["interleave"] = interleave;
    return two_stage(x, first, second, bias, {k, l}, runs, interleave, features);
  }
  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    static auto call = op<std::tuple<Tensor, Tensor, Tensor>(
        const Tensor&, const Tensor&, const Tensor&, const Tensor&, at::IntArrayRef, bool, bool, std::array<bool, 3>)>(
        "isogrid::two_stage_backward");
    const auto saved = ctx->get_saved_variables();
    const Tensor &g = gradients[0], &x = saved[0], &first = saved[1], &second = saved[2];
    const std::array<int64_t, 2> blocks{ctx->saved_data["k"].toInt(), ctx->saved_data["l"].toInt()};
    const bool runs = ctx->saved_data["runs"].toBool(), interleave = ctx->saved_data["interleave"].toBool();
    const std::array<bool, 3> wanted{ctx->needs_input_grad(0), ctx->needs_input_grad(1), ctx->needs_input_grad(2)};
    const Tensor dbias = bias_gradient(ctx, 3, g);
    variable_list found(3);
    if (at::GradMode::is_enabled()) {
      const auto plain = [&](const variable_list& v) {
        return plain_two_stage(v[0], v[1], v[2], blocks, runs, interleave, g.size(1));
      };
      found = again(plain, g, {x, first, second}, wanted);
    } else if (wanted[0] || wanted[1] || wanted[2]) {
      const auto [dx, dfirst, dsecond] = call.call(g, x, first, second, blocks, runs, interleave, wanted);
      found = {if_wanted(wanted[0], dx), if_wanted(wanted[1], dfirst), if_wanted(wanted[2], dsecond)};
    }
    return {found[0], found[1], found[2], dbias, Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

struct BlastProduct : Function<BlastProduct> {
  static Tensor forward(
      AutogradContext* ctx, const Tensor& x, const Tensor& right, const Tensor& coupling, const Tensor& left,
      const Bias& bias, int64_t features) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->saved_data["bias"] = bias.has_value();
    ctx->save_for_backward({x, right, coupling, left});
    return blast(x, right, coupling, left, bias, features);
  }
  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    static auto call = op<std::tuple<Tensor, Tensor, Tensor, Tensor>(
        const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, std::array<bool, 4>)>(
        "isogrid::blast_backward");
    const auto saved = ctx->get_saved_variables();
    const Tensor &g = gradients[0], &x = saved[0], &right = saved[1], &coupling = saved[2], &left = saved[3];
    std::array<bool, 4> wanted;
    for (size_t i = 0; i < 4; ++i) wanted[i] = ctx->needs_input_grad(i);
    const Tensor dbias = bias_gradient(ctx, 4, g);
    variable_list found(4);
    if (at::GradMode::is_enabled()) {
      const auto plain = [&](const variable_list& v) { return plain_blast(v[0], v[1], v[2], v[3], g.size(1)); };
      found = again(plain, g, {x, right, coupling, left}, wanted);
    } else if (wanted[0] || wanted[1] || wanted[2] || wanted[3]) {
      const auto [dx, dright, dcoupling, dleft] = call.call(g, x, right, coupling, left, wanted);
      found = {
          if_wanted(wanted[0], dx), if_wanted(wanted[1], dright), if_wanted(wanted[2], dcoupling),
          if_wanted(wanted[3], dleft)};
    }
    return {found[0], found[1], found[2], found[3], dbias, Tensor()};
  }
};

Tensor blocked_autograd(
    const Tensor& x, const Tensor& w, const Bias& bias, int64_t k, bool in, bool out, int64_t features) {
  if (differentiates({&x, &w}, bias)) return Blocked::apply(x, w, bias, k, in, out, features);
  at::AutoDispatchBelowADInplaceOrView below;
  return blocked(x, w, bias, k, in, out, features);
}

Tensor two_stage_autograd(
    const Tensor& x, const Tensor& first, const Tensor& second, const Bias& bias, at::IntArrayRef blocks, bool runs,
    bool interleave, int64_t features) {
  if (differentiates({&x, &first, &second}, bias))
    return TwoStage::apply(x, first, second, bias, blocks[0], blocks[1], runs, interleave, features);
  at::AutoDispatchBelowADInplaceOrView below;
  return two_stage(x, first, second, bias, blocks, runs, interleave, features);
}

Tensor blast_autograd(
    const Tensor& x, const Tensor& right, const Tensor& coupling, const Tensor& left, const Bias& bias,
    int64_t features) {
  if (differentiates({&x, &right, &coupling, &left}, bias))
    return BlastProduct::apply(x, right, coupling, left, bias, features);
  at::AutoDispatchBelowADInplaceOrView below;
  return blast(x, right, coupling, left, bias, features);
}

TORCH_LIBRARY_IMPL(isogrid, Autograd, m) {
  m.impl("blocked", &blocked_autograd);
  m.impl("two_stage", &two_stage_autograd);
  m.impl("blast", &blast_autograd);
}

Tensor cast(const Tensor& value) {
  return at::autocast::cached_cast(at::autocast::get_autocast_dtype(at::kCPU), value, c10::DeviceType::CPU);
}

Bias cast(const Bias& value) {
  return value.has_value() ? Bias(cast(*value)) : value;
}

Tensor blocked_autocast(
    const Tensor& x, const Tensor& w, const Bias& bias, int64_t k, bool in, bool out, int64_t features) {
  c10::impl::ExcludeDispatchKeyGuard without(c10::DispatchKey::AutocastCPU);
  return blocked(cast(x), cast(w), cast(bias), k, in, out, features);
}

Tensor two_stage_autocast(
    const Tensor& x, const Tensor& first, const Tensor& second, const Bias& bias, at::IntArrayRef blocks, bool runs,
    bool interleave, int64_t features) {
  c10::impl::ExcludeDispatchKeyGuard without(c10::DispatchKey::AutocastCPU);
  return two_stage(cast(x), cast(first), cast(second), cast(bias), blocks, runs, interleave, features);
}

Tensor blast_autocast(
    const Tensor& x, const Tensor& right, const Tensor& coupling, const Tensor& left, const Bias& bias,
    int64_t features) {
  c10::impl::ExcludeDispatchKeyGuard without(c10::DispatchKey::AutocastCPU);
  return blast(cast(x), cast(right), cast(coupling), cast(left), cast(bias), features);
}

TORCH_LIBRARY_IMPL(isogrid, AutocastCPU, m) {
  m.impl("blocked", &blocked_autocast);
  m.impl("two_stage", &two_stage_autocast);
  m.impl("blast", &blast_autocast);
}

}  // namespace isogrid
