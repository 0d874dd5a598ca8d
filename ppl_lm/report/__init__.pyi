from .heat_map import heat_html as heat_html
from .leaderboard_page import leaderboard as leaderboard
from .run_page import report as report
