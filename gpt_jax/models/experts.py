"""Mixture-of-experts layers: E MLPs, of which each token goes through k.

B batch, T length, D width, F MLP width, E experts, k experts of a token, C places of an expert in a
row, n = T k choices.

A router, one product to E logits in f32, gives every token a probability for each expert; the k
largest are its experts. With k > 1 their probabilities divided by their sum are the gates (Mixtral,
arXiv:2401.04088); with k = 1 the gate is the probability itself, from which the router learns
(Switch Transformer, arXiv:2101.03961).

Without a capacity every expert computes every token and the gates of those that were not chosen are
zero: exact whatever is chosen, and E / k times the products. With a capacity, and while training
alone, an expert takes the first C = ceil(capacity T k / E) of a row's choices that fall on it, in
the order of the tokens; the others add nothing to the residual stream (GShard, arXiv:2006.16668).
First come, first served within a row is causal and does not know what other rows there are, so
neither the mesh nor the accumulation changes it. Evaluation and decoding drop nothing; so a cache
gives what the whole text gives.

On the mesh experts lie over `expert`, over which the rows of a batch lie too: between the two the
chosen tokens change places (an all-to-all).
"""

import math
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from gpt_jax.models.config import TransformerConfig
from gpt_jax.models.layers import activate, is_gated, param, weight_init
from gpt_jax.ops import products
from gpt_jax.parallel.sharding import constrain
from gpt_jax.types import Array, Tree

# The collection of sums that the router tells; whoever asks for it is training.
ROUTER = "router"


class PerExpert(nn.Module):
    """A product, and a bias if the config has them, for each expert."""

    config: TransformerConfig
    shape: tuple[int, int]
    axes: tuple[str, str]
    residual: bool = False

    @nn.compact
    def __call__(
        self, x: Array, how: str, precision: products.Precision
    ) -> tuple[Array, Array | None]:
        """The einsum `how` of x and the kernels [E, in, out]; and the biases to add, [E, out]."""
        c = self.config
        init = weight_init(c, self.shape[0], residual=self.residual)
        shape, axes = (c.num_experts, *self.shape), ("expert", *self.axes)
        y = products.einsum(how, x, param(self, "kernel", init, axes, shape), precision)
        if not c.bias:
            return y, None
        return y, param(self, "bias", nn.initializers.zeros, (axes[0], axes[2]), shape[::2])


class Experts(nn.Module):
    """The MLPs of a layer and the router before them."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x_BTD: Array, segment_ids_BT: Array | None, platform: str) -> Array:
        c = self.config
        B, T = x_BTD.shape[:2]
        real_BT = jnp.ones((B, T), bool) if segment_ids_BT is None else segment_ids_BT > 0
        logits_BTE = self._logits(x_BTD, platform)
        probabilities_BTE = jax.nn.softmax(logits_BTE, axis=-1)
        gates_BTk, chosen_BTk = jax.lax.top_k(probabilities_BTE, c.experts_per_token)
        if c.experts_per_token > 1:
            gates_BTk = gates_BTk / gates_BTk.sum(-1, keepdims=True)
        precision = products.precision(c.dtype, platform)
        training = self.is_mutable_collection(ROUTER) and not self.is_initializing()
        kept_BTk = jnp.broadcast_to(real_BT[..., None], chosen_BTk.shape)
        if training and c.expert_capacity:
            places = num_places(c, T)
            place_BTk = places_of_choices(chosen_BTk, real_BT, c.num_experts)
            kept_BTk &= place_BTk < places
            y_BTD = self._by_places(
                x_BTD, gates_BTk * kept_BTk, chosen_BTk, jnp.where(kept_BTk, place_BTk, places),
                places, precision,
            )  # fmt: skip
        else:
            y_BTD = self._by_all(x_BTD, gates_BTk, chosen_BTk, precision)
        if training:
            sums = router_sums(logits_BTE, probabilities_BTE, chosen_BTk, real_BT)
            choices = real_BT.sum() * c.experts_per_token
            sums["dropped"] = (choices - kept_BTk.sum()) / c.experts_per_token
            for name, value in sums.items():
                self.sow(ROUTER, name, value)
        return y_BTD

    def _logits(self, x_BTD: Array, platform: str) -> Array:
        """f32: which expert is largest is sensitive to the last digits (arXiv:2101.03961)."""
        c = self.config
        init = weight_init(c, c.embed_dim)
        w = param(self, "router", init, ("embed", None), (c.embed_dim, c.num_experts))
        precision = products.precision("float32", platform)
        return products.project(x_BTD.astype(jnp.float32), w, precision)

    def _products(self) -> tuple[PerExpert, PerExpert | None, PerExpert]:
        c = self.config
        wide, narrow = (c.embed_dim, c.mlp_dim), (c.mlp_dim, c.embed_dim)
        up = PerExpert(c, wide, ("embed", "mlp"), name="up")
        gate = PerExpert(c, wide, ("embed", "mlp"), name="gate") if is_gated(c) else None
        return up, gate, PerExpert(c, narrow, ("mlp", "embed"), residual=True, name="down")

    def _by_all(self, x_BTD, gates_BTk, chosen_BTk, precision) -> Array:
        """Every expert computes every token."""
        c = self.config
        up, gate, down = self._products()
        one_hot = jax.nn.one_hot(chosen_BTk, c.num_experts, dtype=jnp.float32)
        gates_BTE = (one_hot * gates_BTk[..., None]).sum(2)
        # Each device computes its experts for the rows of all devices along `expert`.
        x_BTD = constrain(x_BTD, "rows_of_an_expert", "length", None)
        gates_BTE = constrain(gates_BTE, "rows_of_an_expert", "length", None)
        h_EBTF = self._hidden(up, gate, x_BTD, "btd,edf->ebtf", precision)
        h_EBTF = constrain(h_EBTF, "expert", "rows_of_an_expert", "length", "mlp")
        gates_EBT1 = jnp.moveaxis(gates_BTE, 2, 0)[..., None]
        h_EBTF = (h_EBTF * gates_EBT1).astype(h_EBTF.dtype)
        y_BTD, bias_ED = down(h_EBTF, "ebtf,efd->btd", precision)
        if bias_ED is not None:
            y_BTD = y_BTD + jnp.einsum("bte,ed->btd", gates_BTE, bias_ED).astype(y_BTD.dtype)
        return constrain(y_BTD, "batch", "length", None)

    def _by_places(self, x_BTD, gates_BTk, chosen_BTk, place_BTk, places, precision) -> Array:
        """Each expert computes its places; a choice without one has the gate 0."""
        c = self.config
        up, gate, down = self._products()
        B, T, D = x_BTD.shape
        E, k = c.num_experts, c.experts_per_token
        # The last one is for all choices that got none.
        slot_Bn = jnp.where(place_BTk < places, chosen_BTk * places + place_BTk, E * places)
        slot_Bn = slot_Bn.reshape(B, T * k)
        token_n = jnp.repeat(jnp.arange(T), k)
        empty_S = jnp.zeros(E * places + 1, jnp.int32)
        token_BS = jax.vmap(lambda slot_n: empty_S.at[slot_n].set(token_n))(slot_Bn)
        taken = jnp.take_along_axis(x_BTD, token_BS[:, :-1, None], axis=1)
        x_EBCD = taken.reshape(B, E, places, D).swapaxes(0, 1)
        x_EBCD = constrain(x_EBCD, "expert", "rows_of_an_expert", None, None)
        h_EBCF = self._hidden(up, gate, x_EBCD, "ebcd,edf->ebcf", precision)
        y_EBCD, bias_ED = down(h_EBCF, "ebcf,efd->ebcd", precision)
        if bias_ED is not None:
            y_EBCD = y_EBCD + bias_ED[:, None, None].astype(y_EBCD.dtype)
        y_BSD = y_EBCD.swapaxes(0, 1).reshape(B, E * places, D)
        y_BSD = constrain(y_BSD, "batch", None, None)
        slot_Bn = jnp.minimum(slot_Bn, E * places - 1)
        y_BTkD = jnp.take_along_axis(y_BSD, slot_Bn[..., None], axis=1).reshape(B, T, k, D)
        return (y_BTkD * gates_BTk[..., None]).sum(2).astype(x_BTD.dtype)

    def _hidden(self, up, gate, x, how: str, precision) -> Array:
        def product(of: PerExpert) -> Array:
            h, bias_EF = of(x, how, precision)
            return h if bias_EF is None else h + bias_EF[:, None, None].astype(h.dtype)

        return activate(self.config, product(up), None if gate is None else product(gate))


def num_places(config: TransformerConfig, length: int) -> int:
    """C, places that an expert has in a row of `length` tokens while training."""
    c = config
    even = length * c.experts_per_token / c.num_experts
    return min(length, max(1, math.ceil(c.expert_capacity * even)))


def places_of_choices(chosen_BTk: Array, real_BT: Array, num_experts: int) -> Array:
    """int32[B, T, k]: how many choices of the row before this one fell on the same expert.

    Args:
      chosen_BTk: Experts of the tokens.
      real_BT: Tokens that are no padding: padding takes no place.
      num_experts: E.
    """
    B, T, k = chosen_BTk.shape
    is_chosen = jax.nn.one_hot(chosen_BTk, num_experts, dtype=jnp.int32) * real_BT[..., None, None]
    flat_BnE = is_chosen.reshape(B, T * k, num_experts)
    before_BnE = jnp.cumsum(flat_BnE, axis=1) - flat_BnE
    return (before_BnE * flat_BnE).sum(-1).reshape(B, T, k)


def router_sums(
    logits_BTE: Array, probabilities_BTE: Array, chosen_BTk: Array, real_BT: Array
) -> dict[str, Array]:
    """Sums over a batch's real tokens, to be divided by their number over the global batch.

    Returns:
      balance: E sum_e f_e P_e of each row times its tokens, where f_e is the share of the row's
        choices that fall on expert e, before any is dropped, and P_e its mean probability
        (arXiv:2101.03961, equation 4). Of a row and not of the batch: so it is a sum over rows,
        the same however these are split over devices and microbatches.
      z: The squared logsumexp of the logits (arXiv:2202.08906, equation 5).
    """
    E, k = logits_BTE.shape[-1], chosen_BTk.shape[-1]
    weight_BT1 = real_BT.astype(jnp.float32)[..., None]
    num_B1 = jnp.maximum(weight_BT1.sum(1), 1.0)
    counts_BTE = jax.nn.one_hot(chosen_BTk, E, dtype=jnp.float32).sum(2)
    share_BE = (counts_BTE * weight_BT1).sum(1) / (k * num_B1)
    mean_BE = (probabilities_BTE * weight_BT1).sum(1) / num_B1
    balance_B = E * (share_BE * mean_BE).sum(-1) * weight_BT1.sum((1, 2))
    z_BT = jnp.square(jax.nn.logsumexp(logits_BTE, axis=-1)) * weight_BT1[..., 0]
    return {"balance": balance_B.sum(), "z": z_BT.sum()}


def summed(variables: Mapping[str, Tree], num_layers: int) -> dict[str, Array]:
    """The means over the layers of what each of them has sown into ROUTER."""
    sums: dict[str, Array] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(variables[ROUTER])[0]:
        name = [str(key.key) for key in path if hasattr(key, "key")][-1]
        sums[name] = sums.get(name, 0.0) + jnp.sum(leaf) / num_layers
    return sums
