"""Pipeline parallelism: a model cut in depth into stages.

`partition` assigns blocks to stages, `schedules` orders the passes, `channels` sends messages, `run` executes a
schedule.
"""
