"""Policies that choose by themselves: ``abft.policies.Adaptive``, and what it needs to know of a model."""

from abft.policies.adaptive import Adaptive, Plan, SiteChoice
from abft.policies.explain import Explanation
from abft.policies.measure import profile
from abft.policies.options import LADDER, Option
from abft.policies.profile import Profile, SiteProfile, counted

__all__ = ["LADDER", "Adaptive", "Explanation", "Option", "Plan", "Profile", "SiteChoice", "SiteProfile", "counted", "profile"]
