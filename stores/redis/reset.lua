-- Deletes a thread's log, unless it has had its last entry.
--
-- KEYS: the thread's stream
local top = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1]
if not top or top[2][8] == 'log' then return 0 end
return redis.call('UNLINK', KEYS[1])
