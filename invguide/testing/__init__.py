"""What solvers, operators and priors promise, checked: for the tests of this package, and of your own classes.

    check_solver(MySolver(num_steps=8))
    check_operator(MyOperator(), shape=(3, 8, 8))
    check_prior(MyPrior())

Each returns nothing, or raises a ContractError that names the promise and the numbers. They need no test runner.
"""

from invguide.errors import ContractError
from invguide.testing.operator import check_operator
from invguide.testing.prior import check_prior
from invguide.testing.solver import check_solver

__all__ = ["ContractError", "check_operator", "check_prior", "check_solver"]
