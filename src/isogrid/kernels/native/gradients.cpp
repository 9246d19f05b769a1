// Gradients of the products, by the products themselves; and what autocast makes of their arguments.

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace isogrid {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

Tensor blocked(const Tensor& x, const Tensor& w, bool in_turn, bool out_turn, int64_t features) {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("isogrid::blocked", "")
                       .typed<Tensor(const Tensor&, const Tensor&, bool, bool, int64_t)>();
  return op.call(x, w, in_turn, out_turn, features);
}

Tensor two_stage(const Tensor& x, const Tensor& first, const Tensor& second, bool interleave, int64_t features) {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("isogrid::two_stage", "")
                       .typed<Tensor(const Tensor&, const Tensor&, const Tensor&, bool, int64_t)>();
  return op.call(x, first, second, interleave, features);
}

Tensor blast(const Tensor& x, const Tensor& right, const Tensor& coupling, const Tensor& left, int64_t features) {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("isogrid::blast", "")
                       .typed<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, int64_t)>();
  return op.call(x, right, coupling, left, features);
}

Tensor turned(const Tensor& x, const Tensor& w) {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("isogrid::turned", "")
                       .typed<Tensor(const Tensor&, const Tensor&)>();
  return op.call(x, w);
}

Tensor gram(const Tensor& y, const Tensor& x, int64_t blocks) {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("isogrid::gram", "")
                       .typed<Tensor(const Tensor&, const Tensor&, int64_t)>();
  return op.call(y, x, blocks);
}

// (rows, features) with the features of a block beside each other, none missing.
Tensor block_by_block(const Tensor& x, int64_t blocks, int64_t size, bool in_turn) {
  const int64_t missing = blocks * size - x.size(1);
  const Tensor whole = missing > 0 ? at::constant_pad_nd(x, {0, missing}) : x;
  if (!in_turn || blocks == 1 || size == 1) return whole;
  return whole.view({x.size(0), size, blocks}).transpose(1, 2).reshape({x.size(0), blocks * size});
}

// The other way round.
Tensor as_dealt(const Tensor& x, int64_t blocks, int64_t size, bool in_turn, int64_t features) {
  Tensor whole = x;
  if (in_turn && blocks > 1 && size > 1)
    whole = x.view({x.size(0), blocks, size}).transpose(1, 2).reshape({x.size(0), blocks * size});
  return features < whole.size(1) ? whole.narrow(1, 0, features) : whole;
}

// Gradients of a product with blocks, both sides block by block.
struct Turned : Function<Turned> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& w) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({x, w});
    return turned(x, w);
  }
  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &w = saved[1], g = gradients[0].contiguous();
    Tensor dx, dw;
    if (ctx->needs_input_grad(0)) dx = blocked(g, w, false, false, x.size(1));
    if (ctx->needs_input_grad(1)) dw = gram(x, g, w.size(0));
    return {dx, dw};
  }
};

struct Gram : Function<Gram> {
  static Tensor forward(AutogradContext* ctx, const Tensor& y, const Tensor& x, int64_t blocks) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({y, x});
    return gram(y, x, blocks);
  }
  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &y = saved[0], &x = saved[1], g = gradients[0].contiguous();
    Tensor dy, dx;
    if (ctx->needs_input_grad(0)) dy = blocked(x, g, false, false, y.size(1));
    if (ctx->needs_input_grad(1)) dx = turned(y, g);
    return {dy, dx, Tensor()};
  }
};

struct Blocked : Function<Blocked> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& w, bool in, bool out, int64_t features) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({x, w});
    ctx->saved_data["in"] = in;
    ctx->saved_data["out"] = out;
    return blocked(x, w, in, out, features);
  }
  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &w = saved[1];
    const bool in = ctx->saved_data["in"].toBool(), out = ctx->saved_data["out"].toBool();
    const int64_t k = w.size(0), q = w.size(1), p = w.size(2);
    const Tensor g = block_by_block(gradients[0].contiguous(), k, q, out);
    Tensor dx, dw;
    if (ctx->needs_input_grad(0)) dx = as_dealt(turned(g, w), k, p, in, x.size(1));
    if (ctx->needs_input_grad(1)) dw = gram(g, block_by_block(x, k, p, in), k);
    return {dx, dw, Tensor(), Tensor(), Tensor()};
  }
};

struct TwoStage : Function<TwoStage> {
  static Tensor forward(
      AutogradContext* ctx, const Tensor& x, const Tensor& first, const Tensor& second, bool interleave,
      int64_t features) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({x, first, second});
    ctx->saved_data["interleave"] = interleave;
    return two_stage(x, first, second, interleave, features);
  }
  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &first = saved[1], &second = saved[2];
    const bool turn = ctx->saved_data["interleave"].toBool();
    const int64_t k = first.size(0), q = first.size(1), p = first.size(2);
    const int64_t l = second.size(0), s = second.size(1), r = second.size(2);
    const Tensor g = block_by_block(gradients[0].contiguous(), l, s, turn);
    Tensor dx, dfirst, dsecond;
    if (ctx->needs_input_grad(0) || ctx->needs_input_grad(1)) {
      const Tensor dhidden = as_dealt(turned(g, second), l, r, true, k * q);
      if (ctx->needs_input_grad(0)) dx = as_dealt(turned(dhidden, first), k, p, false, x.size(1));
      if (ctx->needs_input_grad(1)) dfirst = gram(dhidden, block_by_block(x, k, p, false), k);
    }
    if (ctx->needs_input_grad(2)) {  // the hidden units again: half a product is cheaper than keeping them
      const Tensor hidden = blocked(x, first, false, false, k * q);
      dsecond = gram(g, block_by_block(hidden, l, r, true), l);
    }
    return {dx, dfirst, dsecond, Tensor(), Tensor()};
  }
};

struct BlastProduct : Function<BlastProduct> {
  static Tensor forward(
      AutogradContext* ctx, const Tensor& x, const Tensor& right, const Tensor& coupling, const Tensor& left,
      int64_t features) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({x, right, coupling, left});
    return blast(x, right, coupling, left, features);
  }
  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &right = saved[1], &coupling = saved[2], &left = saved[3];
    const Tensor mixing = coupling.permute({2, 0, 1});  // (rank, row blocks, column blocks)
    const int64_t b = right.size(0), r = right.size(1), p = right.size(2), s = left.size(1), rows = x.size(0);
    const Tensor g = block_by_block(gradients[0].contiguous(), b, s, false);
    Tensor dx, dright, dcoupling, dleft, hidden;
    const bool before = ctx->needs_input_grad(0) || ctx->needs_input_grad(1);
    if (ctx->needs_input_grad(2) || ctx->needs_input_grad(3)) hidden = blocked(x, right, false, false, b * r);
    if (ctx->needs_input_grad(3)) {
      const Tensor mixed = at::bmm(mixing, hidden.view({rows, b, r}).permute({2, 1, 0}));  // (rank, row blocks, rows)
      dleft = gram(g, mixed.permute({2, 1, 0}).reshape({rows, b * r}), b);
    }
    if (before || ctx->needs_input_grad(2)) {
      const Tensor dmixed = turned(g, left).view({rows, b, r}).permute({2, 1, 0});
      if (ctx->needs_input_grad(2))
        dcoupling = at::bmm(dmixed, hidden.view({rows, b, r}).permute({2, 0, 1})).permute({1, 2, 0});
      if (before) {
        const Tensor dhidden = at::bmm(mixing.mT(), dmixed).permute({2, 1, 0}).reshape({rows, b * r});
        if (ctx->needs_input_grad(0)) dx = as_dealt(turned(dhidden, right), b, p, false, x.size(1));
        if (ctx->needs_input_grad(1)) dright = gram(dhidden, block_by_block(x, b, p, false), b);
      }
    }
    return {dx, dright, dcoupling, dleft, Tensor()};
  }
};

bool differentiates(std::initializer_list<const Tensor*> tensors) {
  if (!at::GradMode::is_enabled()) return false;
  for (const Tensor* one : tensors)
    if (one->requires_grad()) return true;
  return false;
}

Tensor turned_autograd(const Tensor& x, const Tensor& w) {
  if (differentiates({&x, &w})) return Turned::apply(x, w.contiguous());
  at::AutoDispatchBelowADInplaceOrView below;
  return turned(x, w);
}

Tensor gram_autograd(const Tensor& y, const Tensor& x, int64_t blocks) {
  if (differentiates({&y, &x})) return Gram::apply(y, x, blocks);
  at::AutoDispatchBelowADInplaceOrView below;
  return gram(y, x, blocks);
}

Tensor blocked_autograd(const Tensor& x, const Tensor& w, bool in_turn, bool out_turn, int64_t features) {
  if (differentiates({&x, &w})) return Blocked::apply(x, w.contiguous(), in_turn, out_turn, features);
  at::AutoDispatchBelowADInplaceOrView below;
  return blocked(x, w, in_turn, out_turn, features);
}

Tensor two_stage_autograd(
    const Tensor& x, const Tensor& first, const Tensor& second, bool interleave, int64_t features) {
  if (differentiates({&x, &first, &second}))  // turned once, for both ways
    return TwoStage::apply(x, first.contiguous(), second.contiguous(), interleave, features);
  at::AutoDispatchBelowADInplaceOrView below;
  return two_stage(x, first, second, interleave, features);
}

Tensor blast_autograd(
    const Tensor& x, const Tensor& right, const Tensor& coupling, const Tensor& left, int64_t features) {
  if (differentiates({&x, &right, &coupling, &left}))
    return BlastProduct::apply(x, right.contiguous(), coupling, left.contiguous(), features);
  at::AutoDispatchBelowADInplaceOrView below;
  return blast(x, right, coupling, left, features);
}

TORCH_LIBRARY_IMPL(isogrid, Autograd, m) {
  m.impl("turned", &turned_autograd);
  m.impl("gram", &gram_autograd);
  m.impl("blocked", &blocked_autograd);
  m.impl("two_stage", &two_stage_autograd);
  m.impl("blast", &blast_autograd);
}

Tensor cast(const Tensor& value) {
  return at::autocast::cached_cast(at::autocast::get_autocast_dtype(at::kCPU), value, c10::DeviceType::CPU);
}

Tensor blocked_autocast(const Tensor& x, const Tensor& w, bool in_turn, bool out_turn, int64_t features) {
  c10::impl::ExcludeDispatchKeyGuard without(c10::DispatchKey::AutocastCPU);
  return blocked(cast(x), cast(w), in_turn, out_turn, features);
}

Tensor two_stage_autocast(
    const Tensor& x, const Tensor& first, const Tensor& second, bool interleave, int64_t features) {
  c10::impl::ExcludeDispatchKeyGuard without(c10::DispatchKey::AutocastCPU);
  return two_stage(cast(x), cast(first), cast(second), interleave, features);
}

Tensor blast_autocast(
    const Tensor& x, const Tensor& right, const Tensor& coupling, const Tensor& left, int64_t features) {
  c10::impl::ExcludeDispatchKeyGuard without(c10::DispatchKey::AutocastCPU);
  return blast(cast(x), cast(right), cast(coupling), cast(left), features);
}

TORCH_LIBRARY_IMPL(isogrid, AutocastCPU, m) {
  m.impl("blocked", &blocked_autocast);
  m.impl("two_stage", &two_stage_autocast);
  m.impl("blast", &blast_autocast);
}

}  // namespace isogrid
