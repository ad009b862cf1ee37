-- The steps of `descend`: down to the next child as long as there is one, else up to the parent. Returns what the next
-- call resumes with, "" when `top` has been visited.
local function climb(head, top, visit, next_child, scans)
  repeat
    spend(1)
    local run, parent = '', ''
    if head ~= 'root' then
      run, parent = unpack(redis.call('HMGET', node_key(head), 'r', 'p'))
    end
    local last = head == 'root' and '' or (run and #run >= 16 and hex(run))
    local child = next_child(head, last)
    if child == nil then
      local owner = head ~= top and (parent == '' and 'root' or redis.call('HGET', junction_key(parent or ''), 'o'))
      visit.leave(head, run)
      if head == top then
        return ''
      end
      child = owner or top
    end
    head = child or head
  until is_spent()
  local cursor = { head }
  for name, scan in pairs(scans) do
    if (scan.at ~= '0' or (scan.is_whole and scan.name and scan.size > 32)) and #cursor <= 100 then
      local child = scan.is_whole and scan.name or ''
      cursor[#cursor + 1] = ('%s:%s:%d:%s'):format(name, scan.at, scan.found and 1 or 0, child)
    end
  end
  return table.concat(cursor, ' ')
end
