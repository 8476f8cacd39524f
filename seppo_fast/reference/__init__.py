"""The reference policy: which past policy it is (pool), and how it draws samples (solver, sampler)."""

from seppo_fast import broken_xformers  # noqa: F401  before diffusers' models
from seppo_fast.reference.guidance import Branch, Guidance, classifier_free, double
from seppo_fast.reference.loop import sample
from seppo_fast.reference.pool import Pool, pick
from seppo_fast.reference.sampler import Sampler
from seppo_fast.reference.solver import SolverTable, solver_table

__all__ = ["Branch", "Guidance", "Pool", "Sampler", "SolverTable", "classifier_free", "double", "pick", "sample", "solver_table"]
