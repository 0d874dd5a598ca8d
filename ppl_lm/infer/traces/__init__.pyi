from .observations import likelihood_bound as likelihood_bound
from .particles import Particles as Particles
from .program_graph import model_graph as model_graph
