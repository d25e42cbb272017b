"""Settings that all tests share."""

from hypothesis import HealthCheck, settings

# A busy machine is no reason to fail: how long examples take to draw says nothing about the code.
settings.register_profile("asyncckpt", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("asyncckpt")
