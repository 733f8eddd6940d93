"""Predicts the cost of a layout without running it: a rank's memory, messages and time, measured on fake tensors.

`search` goes through layouts and ranks them. For each it takes a `rank`, its stages and the `parameters` that it holds,
and predicts `memory` (`passing`: of tensors between stages and pieces), `messages` and `step_time`, by the data sheets
of `gpus`; `muon` is that optimizer's part of each.

A stage costs what its `pieces` cost, measured in a `setting`, by `memory_watch` and the counters of `work`, among ranks
of a `fake_group`. `dry_run` takes whole steps of one rank in that way instead.
"""
