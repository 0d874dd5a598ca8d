from .heat_map import heat_html as heat_html
from .leaderboard_page import leaderboard as leaderboard
from .progress import ProgressBar as ProgressBar
from .run_page import report as report
