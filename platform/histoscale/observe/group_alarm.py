"""x"""
class GroupAlarm:
    def update(self, values): return None
