"""Alarms over the time of a training."""

from spectralmetrics.monitoring.alarms import DEFAULT_ALARMS, Alarm, AlarmRule
from spectralmetrics.monitoring.monitor import AlarmRecorder, Monitor

__all__ = ["DEFAULT_ALARMS", "Alarm", "AlarmRecorder", "AlarmRule", "Monitor"]
