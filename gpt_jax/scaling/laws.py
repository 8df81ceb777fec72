"""Scaling laws: frozen numbers with a `predict`.  numpy alone.

num_params, num_tokens and flops are counted as the points of the fit were (docs/scaling.md);
losses are nats a token. `form` is the formula as people write it, with N for num_params, D for
num_tokens and C for flops. `predict` takes numbers or arrays and broadcasts.
"""

import dataclasses
from typing import Any, ClassVar

import numpy as np

Numbers = Any  # a float or an array of them


@dataclasses.dataclass(frozen=True)
class PowerLaw:
    """y = k x^p, as of the best size for a budget."""

    form: ClassVar[str] = "y = k x^p"
    k: float
    p: float

    def predict(self, x: Numbers) -> np.ndarray:
        return self.k * np.asarray(x, float) ** self.p


@dataclasses.dataclass(frozen=True)
class ComputeLaw:
    """Loss of the best run of each budget (arXiv:2303.08774, section 3.1); b is negative."""

    form: ClassVar[str] = "L(C) = a C^b + c"
    a: float
    b: float
    c: float

    def predict(self, flops: Numbers) -> np.ndarray:
        return self.a * np.asarray(flops, float) ** self.b + self.c


@dataclasses.dataclass(frozen=True)
class ParamDataLaw:
    """Loss of a size trained on so many fresh tokens (arXiv:2203.15556, equation 2)."""

    form: ClassVar[str] = "L(N, D) = E + A / N^alpha + B / D^beta"
    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def predict(self, num_params: Numbers, num_tokens: Numbers) -> np.ndarray:
        of_size = self.A * np.asarray(num_params, float) ** -self.alpha
        return self.E + of_size + self.B * np.asarray(num_tokens, float) ** -self.beta

    @property
    def params_exponent(self) -> float:
        """a of N* ~ C^a; the best number of tokens grows as C^(1 - a)."""
        return self.beta / (self.alpha + self.beta)

    def optimum(
        self, flops: Numbers, flops_per_param_token: float = 6.0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Best (num_params, num_tokens) of a budget C = flops_per_param_token * N * D (equation 4).

        Raises:
          ValueError: One of the two terms is nothing, so that there is no optimum.
        """
        if not (min(self.A, self.B, self.alpha, self.beta) > 0):
            raise ValueError(f"law: {self} has no optimum: A, B, alpha and beta must be above 0")
        both = self.alpha + self.beta
        ratio = (self.alpha * self.A / (self.beta * self.B)) ** (1 / both)
        product = np.asarray(flops, float) / flops_per_param_token  # N * D
        num_params = ratio * product**self.params_exponent
        return num_params, product / num_params

    def optimal_params(self, num_tokens: Numbers) -> np.ndarray:
        """The size for which so many tokens are the best number."""
        both = self.alpha + self.beta
        ratio = (self.alpha * self.A / (self.beta * self.B)) ** (1 / both)
        return ratio * (ratio * np.asarray(num_tokens, float)) ** (self.beta / self.alpha)


@dataclasses.dataclass(frozen=True)
class OvertrainingLaw:
    """Loss at C FLOPs with M tokens a parameter (arXiv:2403.08540, equation 4)."""

    form: ClassVar[str] = "L(C, M) = E + (a M^eta + b M^-eta) C^-eta"
    E: float
    a: float
    b: float
    eta: float

    def predict(self, flops: Numbers, tokens_per_param: Numbers) -> np.ndarray:
        m = np.asarray(tokens_per_param, float)
        ends = self.a * m**self.eta + self.b * m**-self.eta
        return self.E + ends * np.asarray(flops, float) ** -self.eta


@dataclasses.dataclass(frozen=True)
class RepeatedDataLaw:
    """L(N, D) where tokens beyond the unique ones are worth less (arXiv:2305.16264, section 3).

    D' = U_D + U_D R_D* (1 - exp(-R_D / R_D*)), with U_D the unique tokens and R_D = D / U_D - 1 the
    repeats; N' likewise, with U_N the best size for U_D and R_N = N / U_N - 1, where N exceeds it.
    """

    form: ClassVar[str] = "L(N, D, U) = E + A / N'^alpha + B / D'^beta"
    law: ParamDataLaw
    data_half: float  # R_D*
    params_half: float  # R_N*; inf: a size beyond the best is worth its whole number

    def effective(
        self, num_params: Numbers, num_tokens: Numbers, unique_tokens: Numbers
    ) -> tuple[np.ndarray, np.ndarray]:
        """(N', D'): what the run is worth in parameters and in fresh tokens."""
        unique = np.minimum(unique_tokens, num_tokens)
        data = _worth(np.asarray(num_tokens, float), unique, self.data_half)
        if not np.isfinite(self.params_half):
            return np.asarray(num_params, float), data
        base = np.minimum(self.law.optimal_params(unique), num_params)
        return _worth(np.asarray(num_params, float), base, self.params_half), data

    def predict(
        self, num_params: Numbers, num_tokens: Numbers, unique_tokens: Numbers
    ) -> np.ndarray:
        return self.law.predict(*self.effective(num_params, num_tokens, unique_tokens))


def _worth(amount: np.ndarray, base: Numbers, half: float) -> np.ndarray:
    repeats = amount / base - 1
    return base * (1 + half * -np.expm1(-repeats / half))


@dataclasses.dataclass(frozen=True)
class TransferLaw:
    """Effective data transferred by pretraining (arXiv:2102.01293, equation 1.2)."""

    form: ClassVar[str] = "D_T = k D_F^alpha N^beta"
    k: float
    alpha: float
    beta: float

    def predict(self, finetune_tokens: Numbers, num_params: Numbers) -> np.ndarray:
        of_data = np.asarray(finetune_tokens, float) ** self.alpha
        return self.k * of_data * np.asarray(num_params, float) ** self.beta


@dataclasses.dataclass(frozen=True)
class UnifiedTransferLaw:
    """Loss of a finetuned model where data are few (arXiv:2102.01293, the unified form).

    Kaplan's L(N, D) with the effective data in the place of D; D_F itself is small beside D_T
    there.
    """

    form: ClassVar[str] = "L = ((N_c / N)^(alpha_n / alpha_d) + D_c / D_T(D_F, N))^alpha_d"
    transfer: TransferLaw
    params_scale: float  # N_c
    data_scale: float  # D_c
    alpha_n: float
    alpha_d: float

    def predict(self, finetune_tokens: Numbers, num_params: Numbers) -> np.ndarray:
        size = np.asarray(num_params, float)
        of_size = (self.params_scale / size) ** (self.alpha_n / self.alpha_d)
        data = self.transfer.predict(finetune_tokens, size)
        return (of_size + self.data_scale / data) ** self.alpha_d


@dataclasses.dataclass(frozen=True)
class JointLaw:
    """Multiplicative law of finetuning (arXiv:2402.17193, equation 1).

    x is what is varied beside the finetuning data: num_params, pretraining tokens, or the number of
    trained parameters.
    """

    form: ClassVar[str] = "L(X, D_F) = A / (X^alpha D_F^beta) + E"
    A: float
    alpha: float
    beta: float
    E: float

    def predict(self, x: Numbers, finetune_tokens: Numbers) -> np.ndarray:
        of_x = np.asarray(x, float) ** -self.alpha
        return self.A * of_x * np.asarray(finetune_tokens, float) ** -self.beta + self.E
