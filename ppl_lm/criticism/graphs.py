"""Plain networkx graphs of what a user works with: a program's sites, a constraint's automaton, the prefixes of texts."""

from ppl_lm.criticism.prefix_trees import prefix_tree
from ppl_lm.infer.traces.program_graph import model_graph as model
from ppl_lm.likelihood.automaton_graphs import automaton_graph as automaton

__all__ = ["automaton", "model", "prefix_tree"]
