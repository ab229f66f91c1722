"""The scheduler: which tokens of which requests are computed in the next step.

``plan`` makes a :class:`~dovetail.messages.StepPlan`, ``commit`` takes its
:class:`~dovetail.messages.StepResult`. Nothing here knows about prompts and decodes as phases, and nothing
imports torch.
"""
