"""Orthogonal matrices that spread a few large channels over all of them.

    hadamard      H / sqrt(n) with a random sign for each row: each entry has the same size, so that a channel that is m
                  times the others becomes m / sqrt(n) in all channels (QuaRot, arXiv 2404.00456, section 3)
    orthogonal    Q of the QR decomposition of a normal matrix, uniform over all rotations (Haar)
    centred       Q (1, ..., 1) = (1, ..., 1): any rotation in the space that is orthogonal to this vector

Hadamard matrices are made by Sylvester's doubling, H_2n = [[H_n, H_n], [H_n, -H_n]], from one of Paley's (1933):

    n = q + 1        q prime, q = 3 mod 4        H = I + S,   S = [[0, 1], [-1, C]]
    n = 2 (q + 1)    q prime, q = 1 mod 4        H = S x [[1, 1], [1, -1]] + I x [[1, -1], [-1, -1]]
                                                 S = [[0, 1], [1, C]], and x is the Kronecker product

C[i, j] = 1, -1 or 0 as i - j is a square modulo q, none, or 0. Example: 576 = 36 * 16, and 36 = 2 (17 + 1).
"""

import torch

KINDS = ("hadamard", "orthogonal")


def rotation_matrix(n: int, seed: int, *, centred: bool = False, kind: str = "hadamard") -> torch.Tensor:
    """float64 [n, n], orthogonal. kind "hadamard" gives an "orthogonal" one where there is no such matrix of size n."""
    generator = torch.Generator().manual_seed(seed)
    if centred:
        # A reflection that exchanges (1, 0, ...) and (1, ..., 1) / sqrt(n).
        u = torch.full((n,), n**-0.5, dtype=torch.float64)
        u[0] -= 1
        reflection = torch.eye(n, dtype=torch.float64) - 2 * torch.outer(u, u) / u.dot(u).clamp(min=1e-300)
        inner = torch.eye(n, dtype=torch.float64)
        inner[1:, 1:] = _uniform(n - 1, generator)
        return reflection @ inner @ reflection
    matrix = hadamard(n) if kind == "hadamard" else None
    if matrix is None:
        return _uniform(n, generator)
    signs = torch.randint(0, 2, (n,), generator=generator).double() * 2 - 1
    return signs[:, None] * matrix.double() / n**0.5


def is_orthogonal(matrix: torch.Tensor) -> bool:
    """Whether `matrix` is square with orthonormal rows, up to the rounding of float32."""
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
        return False
    unit = torch.eye(len(matrix), dtype=torch.float64)
    return bool(torch.allclose(matrix.double() @ matrix.double().t(), unit, atol=1e-5))


def hadamard(n: int) -> torch.Tensor | None:
    """int64 [n, n] of 1 and -1 with orthogonal rows; None if the constructions above give none."""
    if n == 1:
        return torch.ones(1, 1, dtype=torch.int64)
    if n % 4 == 0 and _is_prime(n - 1):
        skew = _bordered(n - 1)
        skew[1:, 0] = -1
        return torch.eye(n, dtype=torch.int64) + skew
    if n % 4 == 0 and _is_prime(q := n // 2 - 1) and q % 4 == 1:
        ones, twisted = torch.tensor([[1, 1], [1, -1]]), torch.tensor([[1, -1], [-1, -1]])
        return torch.kron(_bordered(q), ones) + torch.kron(torch.eye(q + 1, dtype=torch.int64), twisted)
    half = hadamard(n // 2) if n % 2 == 0 else None
    return None if half is None else torch.kron(torch.tensor([[1, 1], [1, -1]]), half)


def _bordered(q: int) -> torch.Tensor:
    """[[0, 1], [1, C]]."""
    character = torch.full((q,), -1)
    character[torch.arange(1, q) ** 2 % q] = 1
    character[0] = 0
    numbers = torch.arange(q)
    bordered = torch.ones(q + 1, q + 1, dtype=torch.int64)
    bordered[1:, 1:] = character[(numbers[:, None] - numbers) % q]
    bordered[0, 0] = 0
    return bordered


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


def _uniform(n: int, generator: torch.Generator) -> torch.Tensor:
    q, r = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()  # unique, and with it uniform
