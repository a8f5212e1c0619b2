"""How near it was: the largest differences that were seen, for whoever wants to quote them."""

import sys


def pytest_terminal_summary(terminalreporter):
    peers = sys.modules.get("peers")
    for what, (output, gradient) in sorted(peers.seen.items() if peers else ()):
        terminalreporter.write_line(
            f"{what} against its peer: outputs {output:.1e}, gradients {gradient:.1e} (relative)"
        )
