"""The benchmark: this library beside its peers, on one machine, in one run.

`tasks` says what is timed and `targets` what is aimed at; `environments` builds each peer an
environment of its own; `weights` gives all the same model. `process` starts one worker for each
system (`workers/`), `measure` checks that they agree and times them in turn, pair by pair, and
`limits` measures what the machine could do at best. `report` turns what was found (one JSON file)
into the page docs/benchmarks.md. `growth` and `startup` measure each point in a fresh process, and
`guard` is the small form with no peers.
"""
